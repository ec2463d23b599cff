"""StageContext: the argument of a stage function."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from halo_cluster.stage_id import StageId
from halo_evaluation.results import Selection
from halo_jobs.plan import INIT, MAIN_VARIANT, PRETRAIN, SELECT, TOKENIZE
from halo_jobs.recipe import ConversionRecipe, PretrainRecipe, Recipe, TrainingSection
from halo_jobs.work import StageWork
from halo_training.batches import BatchCursor, Sampler
from halo_training.models import DTYPES, ModelBuilder, read_shape
from halo_training.objectives import Objective
from halo_training.trainer import AttemptInProgress, Trainer
from hypenet_megatron.presets import ModelShape
from hypenet_megatron.runtime import ONE_PROCESS, ParallelLayout
from sharded_tensors.reader import NameFilter
from tokenized_data import BlendedSampler, TokenStore, WindowSampler

TRAIN_STORE, HELD_OUT_STORE, RECALL_STORE = "train", "held_out", "recall"


def layout_of(recipe: Recipe) -> ParallelLayout:
    """The layout of the training stages of `recipe`."""
    return ParallelLayout(**recipe.layout.model_dump(exclude={"processes"}))


@dataclass(frozen=True)
class StageContext(StageWork):
    """The work of a stage in one of its processes. `layout` is the layout of this process's world."""

    console: Console
    device: torch.device
    attempt: AttemptInProgress
    layout: ParallelLayout = ONE_PROCESS

    @property
    def name(self) -> str:
        return str(self.id)

    @property
    def variant(self) -> str:
        """The stage's variant: "hybrid", "teacher", or the name of a baseline; for recall, a context length."""
        return self.id.variant

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Attention layers of this stage's variant, counted from 0, from the select stage."""
        selection = Selection.read(self.folders[SELECT])
        return selection.attention_layers if self.variant == MAIN_VARIANT else selection.choices[self.variant]

    def before(self, kind: str, variant: str = "") -> Path:
        """Folder of an earlier stage."""
        return self.folders[StageId(kind, variant)]

    @property
    def conversion(self) -> ConversionRecipe:
        assert isinstance(self.recipe, ConversionRecipe)
        return self.recipe

    @property
    def pretraining(self) -> PretrainRecipe:
        assert isinstance(self.recipe, PretrainRecipe)
        return self.recipe

    def teacher_folder(self) -> Path:
        """Folder of the stage with the teacher's weights: init if it is imported, pretrain if it is trained."""
        return self.folders[INIT if isinstance(self.recipe, ConversionRecipe) else PRETRAIN]

    def builder(self, shape: ModelShape | None = None) -> ModelBuilder:
        """A builder of models of `shape`, by default the teacher's shape."""
        shape, recipe = shape or read_shape(self.teacher_folder()), self.recipe
        student = recipe.student if isinstance(recipe, ConversionRecipe) else None
        return ModelBuilder(
            shape, DTYPES[recipe.precision], self.device, self.layout, recipe.transformer_impl, student
        )

    def store(self, name: str) -> TokenStore:
        """A text store of the tokenize stage. The input hash in its path implies this recipe's tokenizer."""
        return TokenStore.open(self.folders[TOKENIZE] / name)

    def sampler(self, section: TrainingSection) -> Sampler:
        """Windows of prose; the section's `recall_share` of them are recall episodes."""
        prose = WindowSampler(self.store(TRAIN_STORE), section.context_length, self.recipe.seed)
        if section.recall_share == 0.0:
            return prose
        length = section.context_length
        store = TokenStore.open(self.before("recall", str(length)) / RECALL_STORE)
        tokens = self.recipe.recall_episodes_of(section) * length
        recall = WindowSampler(store, length, self.recipe.seed, tokens=tokens)
        shares = [1.0 - section.recall_share, section.recall_share]
        return BlendedSampler([prose, recall], shares)

    def train(
        self, section: TrainingSection, objective: Objective, keep_keys: NameFilter | None = None
    ) -> Trainer:
        """A trainer for this stage that is ready to run."""
        cursor = BatchCursor.of_this_rank(
            self.sampler(section), section.global_batch, section.micro_batch, self.device
        )
        return Trainer(
            self.name, section, objective, cursor, self.folder, self.console, keep_keys, self.attempt
        )
