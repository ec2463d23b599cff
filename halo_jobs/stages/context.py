"""What a stage is given: the recipe, its own folder, the folders of the stages before it, a console, a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from megatron.core import parallel_state
from rich.console import Console

from halo_cluster import StageResult
from halo_jobs.recipe import ConversionRecipe, PretrainRecipe, Recipe, TrainingSection, resolve_path
from halo_training.batches import BatchCursor, Sampler
from halo_training.checkpointing.state import KeyFilter
from halo_training.models import DTYPES, ModelBuilder, read_shape
from halo_training.objectives import Objective
from halo_training.trainer import AttemptInProgress, Trainer
from hypenet_megatron.presets import ModelShape
from hypenet_megatron.runtime import ONE_PROCESS, ParallelLayout
from tokenized_data import BlendedSampler, TokenStore, WindowSampler, load_tokenizer_identity

TRAIN_STORE, HELD_OUT_STORE = "train", "held_out"


def recall_store_name(context_length: int) -> str:
    """Episodes are cut to one context length, so there is a store per length in use."""
    return f"recall-{context_length}"


def tokenizer_folder(recipe: Recipe) -> Path:
    return resolve_path(recipe.teacher if isinstance(recipe, ConversionRecipe) else recipe.tokenizer)


def layout_of(recipe: Recipe) -> ParallelLayout:
    """The layout of the training stages of `recipe`."""
    return ParallelLayout(**recipe.layout.model_dump(exclude={"processes"}))


_tokenizer_identity = cache(
    load_tokenizer_identity
)  # a tokenizer of 150,000 entries takes half a second to read


@dataclass(frozen=True)
class StageContext:
    """`inputs` maps the names of earlier stages to their finished folders; `attempt` is this try at the stage."""

    name: str
    recipe: Recipe
    folder: Path
    inputs: Mapping[str, Path]
    console: Console
    device: torch.device
    attempt: AttemptInProgress
    layout: ParallelLayout = ONE_PROCESS
    """Of the world that this process is in."""

    @property
    def conversion(self) -> ConversionRecipe:
        assert isinstance(self.recipe, ConversionRecipe)
        return self.recipe

    @property
    def pretraining(self) -> PretrainRecipe:
        assert isinstance(self.recipe, PretrainRecipe)
        return self.recipe

    def teacher_folder(self) -> Path:
        """The stage that holds the teacher: imported by init, or trained by pretrain."""
        return self.inputs["init" if isinstance(self.recipe, ConversionRecipe) else "pretrain"]

    def builder(self, shape: ModelShape | None = None) -> ModelBuilder:
        """Of models of the teacher's shape, unless told another."""
        shape, recipe = shape or read_shape(self.teacher_folder()), self.recipe
        return ModelBuilder(
            shape, DTYPES[recipe.precision], self.device, self.layout, recipe.transformer_impl
        )

    def store(self, name: str) -> TokenStore:
        """A store of the tokenize stage; ValueError if it was made with another tokenizer than this recipe's."""
        tokenizer = _tokenizer_identity(tokenizer_folder(self.recipe))
        return TokenStore.open(self.inputs["tokenize"] / name, expected_tokenizer=tokenizer)

    def sampler(self, section: TrainingSection) -> Sampler:
        """Windows of prose, mixed with recall episodes as the section asks."""
        prose = WindowSampler(self.store(TRAIN_STORE), section.context_length, self.recipe.seed)
        if section.recall_share == 0.0:
            return prose
        store = self.store(recall_store_name(section.context_length))
        recall = WindowSampler(store, section.context_length, self.recipe.seed)
        shares = [1.0 - section.recall_share, section.recall_share]
        return BlendedSampler([prose, recall], shares)

    def train(
        self, section: TrainingSection, objective: Objective, keep_keys: KeyFilter | None = None
    ) -> Trainer:
        """A trainer for this stage, not yet run."""
        cursor = BatchCursor(
            self.sampler(section),
            section.global_batch,
            section.micro_batch,
            self.device,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_ranks=parallel_state.get_data_parallel_world_size(),
            context_rank=parallel_state.get_context_parallel_rank(),
            context_ranks=parallel_state.get_context_parallel_world_size(),
        )
        return Trainer(
            self.name, section, objective, cursor, self.folder, self.console, keep_keys, self.attempt
        )


__all__ = ["StageContext", "StageResult", "recall_store_name"]
