"""export: writes the finished model as a Hugging Face folder that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from durable_files import read_json
from halo_cluster import StageResult
from halo_evaluation.results import Evaluation, Selection
from halo_jobs.plan import MAIN_VARIANT, TEACHER
from halo_jobs.recipe import ConversionRecipe, resolve_path
from halo_jobs.stages.context import HELD_OUT_STORE, TRAIN_STORE, StageContext
from halo_jobs.stages.measure import logits_scaling_base_of
from halo_jobs.stages.training import HYBRID_WEIGHTS, TEACHER_WEIGHTS
from halo_reports.model_card import DataSource, model_card
from halo_reports.run_facts import load_run
from halo_training.models import DTYPES
from hypenet_megatron.mixers import mixer
from hypenet_tools.hugging_face.aux_files import licence_of
from hypenet_tools.hugging_face.config import hypenet_config, qwen3_config
from hypenet_tools.model_weights import read_weights
from hypenet_tools.release import SHARD_BYTES, write_hf_folder

EXPORT_FOLDER = "hypenet"
TEACHER_FOLDER = "teacher"
CORPUS_FACTS = "corpus.json"


def _data_sources(context: StageContext) -> list[DataSource]:
    """One entry per source of the corpus, or per package if the source has a corpus.json."""
    tokens = context.store(TRAIN_STORE).num_tokens
    sources = []
    for source in context.recipe.corpus.train:
        facts_file = resolve_path(source) / CORPUS_FACTS
        if facts_file.is_file():
            facts = read_json(facts_file)
            per_character = tokens / facts["characters"]  # to divide the tokens among the packages
            sources += [
                DataSource(
                    name,
                    entry.get("licence", "see source"),
                    round(entry["train"]["characters"] * per_character),
                    f"version {entry['version']}" if "version" in entry else "",
                )
                for name, entry in facts["sources"].items()
            ]
        else:
            sources.append(DataSource(Path(source).name, "see source", tokens))
    return sources


def run_export(context: StageContext) -> StageResult:
    """Write the recipe's finished model as a Hugging Face folder."""
    return _export_hybrid(context) if isinstance(context.recipe, ConversionRecipe) else _export_teacher(context)


def _export_hybrid(context: StageContext) -> StageResult:
    """Write the main hybrid in the layout of HypeNet releases, with logits scaling and modelling code."""
    recipe = context.conversion
    attention_layers = Selection.read(context.before("select")).attention_layers
    base = logits_scaling_base_of(context.before("calibrate", MAIN_VARIANT))
    teacher = Path(recipe.teacher.rpartition(":")[2]).name
    return _export(
        context,
        EXPORT_FOLDER,
        context.before("finetune", MAIN_VARIANT) / HYBRID_WEIGHTS,
        {"logits_scaling_base": base},
        context.builder().shape.hybrid_mixers(attention_layers, recipe.student),
        base,
        recipe.export.max_shard_megabytes * 10**6,
        title=f"HypeNet from {teacher}",
        base_model=teacher,
        student=mixer(recipe.student).title,
        licence=licence_of(recipe.tokenizer_folder),
    )


def _export_teacher(context: StageContext) -> StageResult:
    """Write a teacher trained from scratch as a plain Qwen3 folder."""
    return _export(
        context,
        TEACHER_FOLDER,
        context.before("pretrain") / TEACHER_WEIGHTS,
        {"held_out_tokens": context.store(HELD_OUT_STORE).num_tokens},
        title=context.recipe.name,
        licence="other",
        ngram_perplexity=Evaluation.read(context.before("evaluate", TEACHER)).ngram_perplexity,
    )


def _export(
    context: StageContext,
    name: str,
    weights: Path,
    summary: Mapping[str, Any],
    mixers: Sequence[str] | None = None,
    base: float | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    **card: Any,
) -> StageResult:
    """Write `weights` to the folder `name`. `card` has those arguments of `model_card` that depend on the model."""
    recipe, shape = context.recipe, context.builder().shape
    tensors, dtype = read_weights(weights), DTYPES[recipe.precision]
    dtype_name = str(dtype).removeprefix("torch.")
    folders = {str(stage): folder for stage, folder in context.folders.items()}
    write_hf_folder(
        context.folder / name,
        tensors,
        shape,
        mixers,
        logits_scaling_base=base,
        tokenizer_folder=recipe.tokenizer_folder,
        dtype=dtype,
        model_card=model_card(
            load_run(context.folder, folders),
            config=hypenet_config(shape, mixers, base, dtype_name) if mixers else qwen3_config(shape, dtype_name),
            parameters=tensors.elements,
            data=_data_sources(context),
            command=f"halo run {recipe.name}",
            **card,
        ),
        max_shard_bytes=max_shard_bytes,
    )
    return StageResult([context.folder / name], {"folder": name, **summary})
