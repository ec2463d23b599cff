"""tokenize: text to token stores, and the recall episodes that training mixes in."""

from __future__ import annotations

import math
import os
from pathlib import Path

from halo_jobs.recall import load_words, write_recall_store
from halo_jobs.recipe import ASSETS, ConversionRecipe, Recipe, TrainingSection, resolve_path
from halo_jobs.stages.context import (
    HELD_OUT_STORE,
    TRAIN_STORE,
    StageContext,
    StageResult,
    recall_store_name,
    tokenizer_folder,
)
from tokenized_data import Split, TokenStore, load_tokenizer_identity, tokenize_text

WORDS_FILE = ASSETS / "words.txt"


def training_sections(recipe: Recipe) -> dict[str, TrainingSection]:
    """Sections of the training stages by their key."""
    if isinstance(recipe, ConversionRecipe):
        return {"align": recipe.align, "distil": recipe.distil, "finetune": recipe.finetune}
    return {"pretrain": recipe.pretrain}


def recall_episodes_needed(recipe: Recipe) -> dict[int, int]:
    """Episodes per context length: enough for the hungriest stage, at most `corpus.recall_episodes`."""
    needed: dict[int, int] = {}
    for section in training_sections(recipe).values():
        if section.recall_share > 0.0:
            episodes = math.ceil(section.steps * section.global_batch * section.recall_share)
            longest = max(needed.get(section.context_length, 0), episodes)
            needed[section.context_length] = min(longest, recipe.corpus.recall_episodes)
    return needed


def run_tokenize(context: StageContext) -> StageResult:
    recipe = context.recipe
    tokenizer = tokenizer_folder(recipe)
    train = [resolve_path(source) for source in recipe.corpus.train]
    held_out = [resolve_path(source) for source in recipe.corpus.held_out]
    share = recipe.corpus.held_out_share
    stores = {
        TRAIN_STORE: _text_store(
            context.folder / TRAIN_STORE, train, tokenizer, "all" if held_out else "train", share
        ),
        HELD_OUT_STORE: _text_store(
            context.folder / HELD_OUT_STORE,
            held_out or train,
            tokenizer,
            "all" if held_out else "held_out",
            share,
        ),
    }
    for context_length, episodes in recall_episodes_needed(recipe).items():
        name = recall_store_name(context_length)
        stores[name] = write_recall_store(
            context.folder / name,
            stores[TRAIN_STORE],
            tokenizer,
            load_words(WORDS_FILE),
            context_length=context_length,
            episodes=episodes,
            seed=recipe.seed,
            answer_weight=recipe.corpus.answer_weight,
            workers=os.cpu_count() or 1,
        )
    summary = {f"{name}_tokens": store.num_tokens for name, store in stores.items()}
    return StageResult([context.folder / name for name in stores], summary)


def _text_store(folder: Path, sources: list[Path], tokenizer: Path, split: Split, share: float) -> TokenStore:
    if folder.exists():  # published whole by an attempt that was killed later in this stage
        return TokenStore.open(folder, expected_tokenizer=load_tokenizer_identity(tokenizer))
    return tokenize_text(sources, tokenizer, folder, split=split, held_out_share=share)
