"""export: the finished model as a Hugging Face folder that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
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
from halo_reports.run_facts import RunFacts, load_run
from halo_training.models import DTYPES
from hypenet_megatron.mixers import mixer
from hypenet_tools.hugging_face.aux_files import licence_of
from hypenet_tools.hugging_face.config import hypenet_config, qwen3_config
from hypenet_tools.model_weights import read_weights
from hypenet_tools.release import write_hf_folder

EXPORT_FOLDER = "hypenet"
TEACHER_FOLDER = "teacher"
CORPUS_FACTS = "corpus.json"


def _data_sources(context: StageContext) -> list[DataSource]:
    """One entry per source of the corpus, or per package where the source has a corpus.json."""
    tokens = context.store(TRAIN_STORE).num_tokens
    sources = []
    for source in context.recipe.corpus.train:
        facts_file = resolve_path(source) / CORPUS_FACTS
        if facts_file.is_file():
            sources += packed_sources(read_json(facts_file), tokens)
        else:
            sources.append(DataSource(source, "see source", tokens))
    return sources


def packed_sources(facts: Mapping[str, Any], tokens: int) -> list[DataSource]:
    """The sources that a corpus.json lists. `tokens` of the corpus are divided among them by characters."""
    per_character = tokens / facts["characters"]
    return [
        DataSource(
            name,
            entry.get("licence", "see source"),
            round(entry["train"]["characters"] * per_character),
            f"version {entry['version']}" if "version" in entry else "",
        )
        for name, entry in facts["sources"].items()
    ]


def _run_facts(context: StageContext) -> RunFacts:
    return load_run(context.folder, {str(stage): folder for stage, folder in context.folders.items()})


def run_export(context: StageContext) -> StageResult:
    """The finished model of the recipe as a Hugging Face folder."""
    return _export_hybrid(context) if isinstance(context.recipe, ConversionRecipe) else _export_teacher(context)


def _export_hybrid(context: StageContext) -> StageResult:
    """The main hybrid in the layout of HypeNet releases, with logits scaling and the modelling code."""
    recipe = context.conversion
    shape = context.builder().shape
    attention_layers = Selection.read(context.before("select")).attention_layers
    mixers = shape.hybrid_mixers(attention_layers, recipe.student)
    base = logits_scaling_base_of(context.before("calibrate", MAIN_VARIANT))
    tensors = read_weights(context.before("finetune", MAIN_VARIANT) / HYBRID_WEIGHTS)
    dtype = DTYPES[recipe.precision]
    config = hypenet_config(shape, mixers, base, str(dtype).removeprefix("torch."))
    card = model_card(
        _run_facts(context),
        title=f"HypeNet from {Path(recipe.teacher.rpartition(':')[2]).name}",
        base_model=Path(recipe.teacher.rpartition(":")[2]).name,
        config=config,
        student=mixer(recipe.student).title,
        parameters=tensors.elements,
        licence=licence_of(recipe.tokenizer_folder),
        data=_data_sources(context),
        command=f"halo run {recipe.name}",
    )
    write_hf_folder(
        context.folder / EXPORT_FOLDER,
        tensors,
        shape,
        mixers,
        logits_scaling_base=base,
        tokenizer_folder=recipe.tokenizer_folder,
        dtype=dtype,
        model_card=card,
        max_shard_bytes=recipe.export.max_shard_megabytes * 10**6,
    )
    return StageResult(
        [context.folder / EXPORT_FOLDER], {"folder": EXPORT_FOLDER, "logits_scaling_base": base}
    )


def _export_teacher(context: StageContext) -> StageResult:
    """A teacher trained from scratch, as a plain Qwen3 folder."""
    recipe = context.pretraining
    shape = context.builder().shape
    tensors = read_weights(context.before("pretrain") / TEACHER_WEIGHTS)
    dtype = DTYPES[recipe.precision]
    evaluation = Evaluation.read(context.before("evaluate", TEACHER))
    card = model_card(
        _run_facts(context),
        title=recipe.name,
        config=qwen3_config(shape, str(dtype).removeprefix("torch.")),
        parameters=tensors.elements,
        licence="other",
        data=_data_sources(context),
        command=f"halo run {recipe.name}",
        ngram_perplexity=evaluation.ngram_perplexity,
    )
    write_hf_folder(
        context.folder / TEACHER_FOLDER,
        tensors,
        shape,
        None,
        tokenizer_folder=recipe.tokenizer_folder,
        dtype=dtype,
        model_card=card,
    )
    held_out = context.store(HELD_OUT_STORE).num_tokens
    return StageResult(
        [context.folder / TEACHER_FOLDER], {"folder": TEACHER_FOLDER, "held_out_tokens": held_out}
    )
