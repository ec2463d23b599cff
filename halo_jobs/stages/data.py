"""tokenize and recall: write token stores of the text, and the recall episodes that training mixes in."""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from halo_cluster import StageResult
from halo_cluster.fan_out import Task
from halo_cluster.fan_out.plan import WorkerFunction
from halo_evaluation.recall import load_words, write_recall_store
from halo_jobs.recipe import ASSETS, Recipe, resolve_path
from halo_jobs.stages.context import HELD_OUT_STORE, RECALL_STORE, TRAIN_STORE, StageContext
from halo_jobs.stages.fan_out import has_workers, run_tasks
from halo_jobs.work import StageWork
from tokenized_data import (
    Split,
    TokenStore,
    encoded_documents,
    load_tokenizer_identity,
    read_encoded,
    text_files,
    tokenize_text,
    write_encoded,
    write_text_store,
)

WORDS_FILE = ASSETS / "words.txt"
PARTS = "parts"


@dataclass(frozen=True)
class _TextStore:
    """A token store to write: its text sources, and which of their documents it has."""

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
    stores = _written_text_stores(context)
    summary = {f"{name}_tokens": store.num_tokens for name, store in stores.items()}
    return StageResult([context.folder / name for name in stores], summary)


def run_recall(context: StageContext) -> StageResult:
    """Write recall episodes of one context length, the stage's variant. Training stages of that length share them."""
    recipe, folder = context.recipe, context.folder / RECALL_STORE
    if folder.exists():  # an earlier attempt was killed after writing it
        store = TokenStore.open(folder)
    else:
        store = write_recall_store(
            folder,
            context.store(TRAIN_STORE),
            recipe.tokenizer_folder,
            load_words(WORDS_FILE),
            context_length=int(context.variant),
            episodes=context.inputs.settings["episodes"],
            seed=recipe.seed,
            answer_weight=recipe.corpus.answer_weight,
            workers=os.cpu_count() or 1,
        )
    return StageResult([folder], {"tokens": store.num_tokens})


def _written_text_stores(context: StageContext) -> dict[str, TokenStore]:
    """Write the missing text stores and return all by name. Keeps stores that a killed attempt finished."""
    tokenizer, share = context.recipe.tokenizer_folder, context.recipe.corpus.held_out_share
    wanted = _text_stores(context.recipe)
    missing = [store for store in wanted if not (context.folder / store.name).exists()]
    if not has_workers(context.recipe):
        for store in missing:
            folder = context.folder / store.name
            tokenize_text(store.sources, tokenizer, folder, split=store.split, held_out_share=share)
    elif missing:
        parts = _encoded_by_workers(context, wanted)
        for store in missing:
            encoded = chain.from_iterable(map(read_encoded, parts[store.name]))
            folder = context.folder / store.name
            write_text_store(folder, encoded, store.sources, tokenizer, store.split, share)
    shutil.rmtree(context.folder / PARTS, ignore_errors=True)
    identity = load_tokenizer_identity(tokenizer)
    return {
        store.name: TokenStore.open(context.folder / store.name, expected_tokenizer=identity)
        for store in wanted
    }


def _encoded_by_workers(context: StageContext, stores: list[_TextStore]) -> dict[str, list[Path]]:
    """Encode every file with the workers of the `fan_out` section. Returns the parts by store name, in file order."""
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


def make_tokenizing_worker(setup: Any) -> WorkerFunction:
    """A worker that encodes one file's documents of one split per task. The result is the name of the part."""
    work = StageWork.from_json(setup)
    tokenizer, share = work.recipe.tokenizer_folder, work.recipe.corpus.held_out_share
    folder = work.folder / PARTS

    def run(arguments: dict[str, Any]) -> str:
        # A worker that counts as lost may still be writing, so each try has its own name.
        part = f"part-{uuid.uuid4().hex}"
        files = [Path(arguments["file"])]
        write_encoded(folder / part, encoded_documents(files, tokenizer, arguments["split"], share))
        return part

    return run
