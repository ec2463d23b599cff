"""Writes a store of recall episodes. Its content does not depend on the number of processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halo_cluster.children import process_pool
from halo_evaluation.recall.episodes import EpisodeGenerator
from halo_evaluation.recall.materials import Materials
from halo_evaluation.recall.words import WordSplit
from terminal_output import ProgressBar
from tokenized_data import TokenStore, TokenStoreWriter

_EPISODES_PER_TASK = 64
# Starting a process, with the imports of its parent's main module, takes as long as generating about 20M tokens.
_TOKENS_PER_PROCESS = 20_000_000
_TASKS_AHEAD_PER_WORKER = 4

Episodes = list[
    tuple[np.ndarray, np.ndarray]
]  # uint32 [context_length] ids, uint8 [context_length] loss weights


@dataclass(frozen=True)
class _Plan:
    """What a worker needs to generate episodes; it is pickled."""

    haystack_folder: Path
    tokenizer_file: Path
    words: tuple[str, ...]
    context_length: int
    seed: int
    answer_weight: int

    def generator(self) -> EpisodeGenerator:
        haystack = TokenStore.open(self.haystack_folder)
        materials = Materials(haystack, self.tokenizer_file, haystack.tokenizer.eos_id, self.words)
        return EpisodeGenerator(materials, self.context_length, self.seed, self.answer_weight)


def _make(generator: EpisodeGenerator, indices: range) -> Episodes:
    return [(ids.astype(np.uint32), weights) for ids, weights in map(generator.episode, indices)]


_worker_generator: EpisodeGenerator | None = None


def _start_worker(plan: _Plan) -> None:
    global _worker_generator
    _worker_generator = plan.generator()


def _make_in_worker(indices: range) -> Episodes:
    assert _worker_generator is not None
    return _make(_worker_generator, indices)


def _generate(plan: _Plan, tasks: Sequence[range], workers: int) -> Generator[Episodes, None, None]:
    """The episodes of every task, in the order of `tasks`."""
    if workers == 1:
        generator = plan.generator()
        yield from (_make(generator, indices) for indices in tasks)
        return
    waiting: deque[Future[Episodes]] = deque()
    with process_pool(workers, _start_worker, plan) as pool:
        try:
            for indices in tasks:
                waiting.append(pool.submit(_make_in_worker, indices))
                if len(waiting) > workers * _TASKS_AHEAD_PER_WORKER:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after Ctrl-C or an error, drop the tasks that were submitted ahead
            pool.shutdown(cancel_futures=True)


def write_recall_store(
    folder: Path,
    haystack: TokenStore,
    tokenizer_folder: Path,
    words: WordSplit,
    *,
    context_length: int,
    episodes: int,
    seed: int,
    answer_weight: int = 4,
    workers: int = 1,
) -> TokenStore:
    """Write `episodes` documents of `context_length` tokens each as a store at `folder`.

    Prose comes from `haystack`, keys from `words.training`. Answer tokens have the loss weight `answer_weight`. At most
    `workers` processes share the work, and the store is the same for any number of them.
    """
    plan = _Plan(
        haystack.folder,
        tokenizer_folder / "tokenizer.json",
        words.training,
        context_length,
        seed,
        answer_weight,
    )
    starts = range(0, episodes, _EPISODES_PER_TASK)
    tasks = [range(start, min(start + _EPISODES_PER_TASK, episodes)) for start in starts]
    useful_workers = min(workers, 1 + episodes * context_length // _TOKENS_PER_PROCESS)
    provenance = {
        "made_by": "recall episodes",
        "haystack": haystack.digest,
        "context_length": context_length,
        "episodes": episodes,
        "seed": seed,
        "answer_weight": answer_weight,
    }
    with (
        ProgressBar("recall episodes", episodes) as bar,
        TokenStoreWriter(folder, haystack.tokenizer, provenance=provenance, loss_weights=True) as writer,
        closing(_generate(plan, tasks, useful_workers)) as generated,
    ):
        for made in generated:
            for ids, loss_weights in made:
                writer.add_document(ids, loss_weights)
            bar.advance(len(made))
    return TokenStore.open(folder)
