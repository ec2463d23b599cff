"""tokenize: text to token stores, and the recall episodes that training mixes in."""

from __future__ import annotations

import math
import os
import shutil
import uuid
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from halo_cluster.fan_out import Task
from halo_cluster.fan_out.plan import Worker
from halo_evaluation.recall import load_words, write_recall_store
from halo_jobs.recipe import ASSETS, ConversionRecipe, Recipe, TrainingSection, resolve_path
from halo_jobs.stages.context import (
    HELD_OUT_STORE,
    TRAIN_STORE,
    StageContext,
    StageResult,
    recall_store_name,
    tokenizer_folder,
)
from halo_jobs.stages.fan_out import has_workers, recipe_of, run_tasks
from tokenized_data import (
    Split,
    TokenStore,
    encoded_documents,
    load_tokenizer_identity,
    read_part,
    text_files,
    tokenize_text,
    write_part,
    write_text_store,
)

WORDS_FILE = ASSETS / "words.txt"
PARTS = "parts"


def training_sections(recipe: Recipe) -> dict[str, TrainingSection]:
    """Sections of the training stages by their key."""
    if isinstance(recipe, ConversionRecipe):
        return {"align": recipe.align, "distill": recipe.distill, "finetune": recipe.finetune}
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


@dataclass(frozen=True)
class _TextStore:
    """A store that the recipe asks for: whose text, and which documents of it."""

    name: str
    sources: list[Path]
    split: Split


def _text_stores(recipe: Recipe) -> list[_TextStore]:
    train = [resolve_path(source) for source in recipe.corpus.train]
    held_out = [resolve_path(source) for source in recipe.corpus.held_out]
    return [
        _TextStore(TRAIN_STORE, train, "all" if held_out else "train"),
        _TextStore(HELD_OUT_STORE, held_out or train, "all" if held_out else "held_out"),
    ]


def run_tokenize(context: StageContext) -> StageResult:
    recipe = context.recipe
    tokenizer = tokenizer_folder(recipe)
    stores = _written_text_stores(context)
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


def _written_text_stores(context: StageContext) -> dict[str, TokenStore]:
    """Every text store by name. One was there before if an attempt was killed later in this stage."""
    tokenizer, share = tokenizer_folder(context.recipe), context.recipe.corpus.held_out_share
    wanted = _text_stores(context.recipe)
    missing = [store for store in wanted if not (context.folder / store.name).exists()]
    if not has_workers(context.recipe):
        for store in missing:
            folder = context.folder / store.name
            tokenize_text(store.sources, tokenizer, folder, split=store.split, held_out_share=share)
    elif missing:
        parts = _encoded_by_workers(context, wanted)
        for store in missing:
            encoded = chain.from_iterable(map(read_part, parts[store.name]))
            folder = context.folder / store.name
            write_text_store(folder, encoded, store.sources, tokenizer, store.split, share)
    shutil.rmtree(context.folder / PARTS, ignore_errors=True)
    identity = load_tokenizer_identity(tokenizer)
    return {
        store.name: TokenStore.open(context.folder / store.name, expected_tokenizer=identity)
        for store in wanted
    }


def _encoded_by_workers(context: StageContext, stores: list[_TextStore]) -> dict[str, list[Path]]:
    """By store, the parts of its files in their order, encoded by the workers of the recipe's `fan_out` section."""
    tasks = {
        store.name: [
            Task(f"{store.name}.{number}", {"file": str(file.resolve()), "split": store.split})
            for number, file in enumerate(text_files(store.sources))
        ]
        for store in stores
    }
    largest_first = sorted(chain(*tasks.values()), key=lambda task: -os.stat(task.arguments["file"]).st_size)
    worker = "halo_jobs.stages.data:make_tokenizing_worker"
    found = run_tasks(context, context.folder / PARTS, worker, largest_first)
    folder = context.folder / PARTS
    return {name: [folder / found[task.name] for task in own] for name, own in tasks.items()}


def make_tokenizing_worker(setup: Any) -> Worker:
    """A task is one text file's documents of one split; its result is the name of the part that holds them."""
    recipe = recipe_of(setup)
    tokenizer, share = tokenizer_folder(recipe), recipe.corpus.held_out_share
    folder = Path(setup["folder"]) / PARTS

    def run(arguments: dict[str, Any]) -> str:
        # A worker that was given up may still write: each try has a name of its own.
        part = f"part-{uuid.uuid4().hex}"
        files = [Path(arguments["file"])]
        write_part(folder / part, encoded_documents(files, tokenizer, arguments["split"], share))
        return part

    return run
