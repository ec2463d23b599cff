"""Finds mistakes in a recipe before its first stage runs: paths, teacher, layers, layout, context lengths."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from halo_evaluation.niah import VARIANTS, needle_task
from halo_evaluation.recall import load_words
from halo_evaluation.recall.episodes import check_episode_settings
from halo_evaluation.recall.materials import Materials
from halo_evaluation.suites import recall_tasks
from halo_jobs.recipe import ConversionRecipe, PretrainRecipe, Recipe, resolve_path
from halo_jobs.stages.context import layout_of
from halo_jobs.stages.data import WORDS_FILE
from hypenet_megatron.mixers import student_mixer
from hypenet_megatron.presets import ModelShape
from hypenet_tools.hugging_face.folder import read_model_folder
from tokenized_data import TokenizerIdentity, load_tokenizer_identity
from tokenized_data.text import text_files


@contextmanager
def named_in_errors(key: str) -> Iterator[None]:
    """Prefix the message of a ValueError raised in the block with the recipe's key."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def check_recipe(recipe: Recipe, *, tokenized: bool = False) -> ModelShape:
    """Raise ValueError, with the key and the fix, for a recipe that would fail in a stage.

    Reads configs, tensor headers and the tokenizer, but no text. With `tokenized`, the text may be gone. Returns the
    shape of the teacher that is converted or trained.
    """
    if not tokenized:
        _check_corpus(recipe)
    shape = _teacher_shape(recipe) if isinstance(recipe, ConversionRecipe) else _planned_shape(recipe)
    with named_in_errors("teacher" if isinstance(recipe, ConversionRecipe) else "tokenizer"):
        tokenizer = load_tokenizer_identity(recipe.tokenizer_folder)
        if tokenizer.vocab_size > shape.vocab_size:
            raise ValueError(
                f"the tokenizer in {recipe.tokenizer_folder} has {tokenizer.vocab_size} ids, the model only "
                f"{shape.vocab_size}; put the model's own tokenizer back"
            )
    if isinstance(recipe, ConversionRecipe):
        with named_in_errors("student"):
            layout_of(recipe).check_mixer(student_mixer(recipe.student))
        _check_selection(recipe, shape)
    _check_layout(recipe, shape)
    _check_packages(recipe)
    _check_teacher_contexts(recipe, shape)
    _check_recall(recipe)
    _check_tasks(recipe, tokenizer)
    return shape


def _check_corpus(recipe: Recipe) -> None:
    for key, sources in (("corpus.train", recipe.corpus.train), ("corpus.held_out", recipe.corpus.held_out)):
        with named_in_errors(key):
            for source in sources:
                text_files([resolve_path(source)])


def _teacher_shape(recipe: ConversionRecipe) -> ModelShape:
    with named_in_errors("teacher"):
        teacher = read_model_folder(_folder(recipe.teacher))
        if teacher.description.mixer_types is not None:
            raise ValueError(f"{teacher.folder} is a HypeNet already; give a Qwen3 model as teacher")
        return teacher.description.shape


def _planned_shape(recipe: PretrainRecipe) -> ModelShape:
    with named_in_errors("tokenizer"):
        vocabulary = load_tokenizer_identity(_folder(recipe.tokenizer)).vocab_size
    with named_in_errors("shape"):
        return ModelShape(name=recipe.name, vocab_size=vocabulary, **recipe.shape.model_dump())


def _folder(value: str) -> Path:
    folder = resolve_path(value)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; correct the path, or fetch the model in Hugging Face layout"
        )
    return folder


def _check_selection(recipe: ConversionRecipe, shape: ModelShape) -> None:
    layers = recipe.select.attention_layers
    if layers is None:
        return
    with named_in_errors("select.attention_layers"):
        if len(set(layers)) < len(layers):
            raise ValueError(f"{layers} names a layer twice; name each once")
        try:
            shape.hybrid_mixers(layers, recipe.student)
        except ValueError as error:
            raise ValueError(f"{error}; choose from 0 to {shape.num_layers - 1}") from None


def _check_layout(recipe: Recipe, shape: ModelShape) -> None:
    layout, processes = layout_of(recipe), recipe.layout.processes
    with named_in_errors("layout"):
        layout.check_model(shape)
        layout.data_ranks(processes)
        if torch.cuda.is_available() and processes > torch.cuda.device_count():
            raise ValueError(
                f"{processes} processes need a GPU each, but there are {torch.cuda.device_count()}; lower processes"
            )
    for name, section in recipe.training_sections.items():
        with named_in_errors(f"{name} in this layout"):
            layout.check_batch(section.context_length, section.global_batch, section.micro_batch, processes)


def _check_packages(recipe: Recipe) -> None:
    """Check that optional packages are installed, before a stage needs them. GPUs may be on another machine."""
    fixes = {
        "ray": "pip install 'hypenet-megatron[ray]'",
        "submitit": "pip install 'hypenet-megatron[slurm]'",
        "transformer_engine": "pip install 'transformer-engine[pytorch]', or set transformer_impl: local",
    }
    backend = "submitit" if recipe.fan_out.backend == "slurm-array" else recipe.fan_out.backend
    for key, package in (("fan_out.backend", backend), ("transformer_impl", recipe.transformer_impl)):
        if package in fixes and importlib.util.find_spec(package) is None:
            raise ValueError(f"{key}: {package} is not installed here; {fixes[package]}")


def _check_teacher_contexts(recipe: Recipe, shape: ModelShape) -> None:
    """Check that stages that run the teacher stay within its positions. Later stages may go beyond them."""
    lengths = {name: section.context_length for name, section in recipe.training_sections.items()}
    if isinstance(recipe, ConversionRecipe):
        del lengths["finetune"]
        lengths["select"] = recipe.select.context_length
    for section, length in lengths.items():
        if length > shape.max_positions:
            raise ValueError(
                f"{section}.context_length: {length} is beyond the {shape.max_positions} positions of the "
                f"teacher {shape.name}; choose at most {shape.max_positions}"
            )


def _check_recall(recipe: Recipe) -> None:
    for name, section in recipe.training_sections.items():
        if section.recall_share == 0.0:
            continue
        if recipe.corpus.recall_episodes == 0:
            raise ValueError(
                f"corpus.recall_episodes: 0 leaves {name} without the episodes that its recall_share of "
                f"{section.recall_share} asks for; allow some, or set {name}.recall_share to 0"
            )
        with named_in_errors(f"{name} with recall_share {section.recall_share}"):
            check_episode_settings(section.context_length, recipe.corpus.answer_weight)


@dataclass(frozen=True)
class _AnyProse:
    """Stands in for held-out text. Whether a needle fits depends only on the length of the text."""

    token: int
    num_tokens: int = 2**20

    def read(self, start: int, length: int) -> np.ndarray:
        return np.full(length, self.token, np.uint32)


def _check_tasks(recipe: Recipe, tokenizer: TokenizerIdentity) -> None:
    """Check that the recall items of every evaluation fit, by building them at its shortest context."""
    for depth in recipe.evaluate.depths:
        if not 0.0 <= depth <= 1.0:
            raise ValueError(
                f"evaluate.depths: {depth} is not a share of the context; choose between 0 (start) and 1 (end)"
            )
    prose = _AnyProse(token=int(tokenizer.eos_id == 0))
    words = load_words(WORDS_FILE).held_out
    materials = Materials(prose, recipe.tokenizer_folder / "tokenizer.json", tokenizer.eos_id, words)
    needles, trained = recipe.evaluate, "pretrain"
    with named_in_errors("evaluate.contexts"):
        for variant in VARIANTS:
            needle_task(
                materials, variant, min(needles.contexts), needles.depths, needles.needle_items, recipe.seed
            )
    if isinstance(recipe, ConversionRecipe):
        select, trained = recipe.select, "distill"
        with named_in_errors("select.context_length"):
            recall_tasks(materials, "selection", select.context_length, select.items, recipe.seed)
    with named_in_errors(f"{trained}.context_length, at which models are evaluated"):
        length = recipe.training_sections[trained].context_length
        recall_tasks(materials, "evaluation", length, needles.suite_items, recipe.seed)
