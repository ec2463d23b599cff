from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from random import Random

import numpy as np
import pytest

from halo_evaluation.interface import ScoreBatch, TokenScores
from halo_evaluation.key_values import key_value_task
from halo_evaluation.last_word import last_word_task
from halo_evaluation.next_sentence import next_sentence_task
from halo_evaluation.niah import VARIANTS, NeedleVariant, needle_task
from halo_evaluation.passages import is_prose, split_sentences
from halo_evaluation.perplexity import perplexity_task
from halo_evaluation.recall.materials import Materials
from halo_evaluation.rows import TokenRow, batches_of, scores_of
from halo_evaluation.runner import evaluate, evaluate_models, needle_cells
from halo_evaluation.suites import HeldOut, Purpose, group_score, task_suite
from halo_evaluation.tasks import EvaluationTask
from tests.support.proxy_corpus import EOS_ID, WORDS, ArrayStore, Corpus

VOCABULARY = 500


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.build(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def materials(corpus: Corpus) -> Materials:
    return corpus.materials(WORDS.held_out)


@pytest.fixture(scope="module")
def held_out(corpus: Corpus, materials: Materials) -> HeldOut:
    return HeldOut(corpus.store, materials)


def oracle(batch: ScoreBatch) -> TokenScores:
    """Predicts every target."""
    return TokenScores(np.zeros(batch.target_mask.shape, np.float32), batch.target_mask)


def uniform(batch: ScoreBatch) -> TokenScores:
    """All tokens are equally likely; token 0 is the arg max."""
    log_probability = np.where(batch.target_mask, -np.log(VOCABULARY), 0.0).astype(np.float32)
    return TokenScores(log_probability, batch.target_mask & (batch.input_ids == 0))


def guessing(batch: ScoreBatch) -> TokenScores:
    """Right for one in twenty tokens, with arbitrary log-probabilities."""
    rng = np.random.default_rng(batch.input_ids.size)
    log_probability = np.where(batch.target_mask, -rng.exponential(size=batch.input_ids.shape), 0.0)
    return TokenScores(
        log_probability.astype(np.float32), batch.target_mask & (rng.random(batch.input_ids.shape) < 0.05)
    )


def digest(tasks: Iterable[EvaluationTask]) -> str:
    content = hashlib.sha256()
    for task in tasks:
        content.update(task.name.encode())
        for batch in task.batches(4096):
            content.update(batch.input_ids.tobytes())
            content.update(batch.target_mask.tobytes())
    return content.hexdigest()


PURPOSES: list[Purpose] = ["selection", "evaluation"]


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_perfect_scorer_has_score_one(held_out: HeldOut, purpose: Purpose) -> None:
    tasks = task_suite(held_out, purpose, context_length=256, items=8, seed=1)
    for name, metrics in evaluate(tasks, oracle, 4096).items():
        if name != "local_next_sentence":  # there, knowing every token means knowing the wrong ones too
            assert metrics["score"] == 1.0
        assert metrics["items"] == 8.0


def test_a_guessing_scorer_has_score_near_zero(held_out: HeldOut) -> None:
    tasks = task_suite(held_out, "selection", context_length=256, items=20, seed=1)
    metrics = evaluate(tasks, guessing, 4096)
    assert group_score(tasks, metrics, "recall") == 0.0
    assert all(0.0 < metrics[task.name]["token_accuracy"] < 0.15 for task in tasks if task.group == "recall")


def test_log_probability_tells_scorers_apart_that_never_hit(held_out: HeldOut) -> None:
    tasks = task_suite(held_out, "selection", context_length=256, items=4, seed=1)

    def doubtful(batch: ScoreBatch) -> TokenScores:
        scores = uniform(batch)
        return TokenScores(2 * scores.log_probability, scores.is_greedy)

    for one, other in zip(
        evaluate(tasks, uniform, 4096).values(), evaluate(tasks, doubtful, 4096).values(), strict=True
    ):
        assert one["answer_log_probability"] == pytest.approx(-np.log(VOCABULARY), rel=1e-6)
        assert other["answer_log_probability"] == pytest.approx(-2 * np.log(VOCABULARY), rel=1e-6)


def test_suites_are_the_same_in_another_process(corpus: Corpus, held_out: HeldOut, tmp_path: object) -> None:
    script = f"""
from pathlib import Path
from tests.support.proxy_corpus import WORDS, Corpus
from tests.halo_evaluation.test_evaluation import HeldOut, digest, task_suite
corpus = Corpus.build(Path({str(tmp_path)!r}))
held_out = HeldOut(corpus.store, corpus.materials(WORDS.held_out))
print(digest(task_suite(held_out, "evaluation", context_length=200, items=5, seed=3)))
"""
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "1234",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]),
    }
    there = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    here = digest(task_suite(held_out, "evaluation", context_length=200, items=5, seed=3))
    assert there.stdout.strip() == here


def test_seeds_and_suites_have_their_own_items(held_out: HeldOut) -> None:
    digests = {
        digest(task_suite(held_out, purpose, context_length=256, items=4, seed=seed))
        for purpose in PURPOSES
        for seed in (1, 2)
    }
    assert len(digests) == 4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_the_needle_lies_once_at_its_depth(
    corpus: Corpus, materials: Materials, variant: NeedleVariant, depth: float
) -> None:
    task = needle_task(materials, variant, 400, [depth], items=5, seed=1)
    for row in task.rows:
        assert row.input_ids.shape == row.target_mask.shape == (400,)
        text = corpus.decode(row.input_ids)
        answer = corpus.decode(row.input_ids[row.target_mask])
        told, _, question = text.rpartition("\nWhat is the special magic ")
        key = question.split()[2].rstrip("?")
        assert key in WORDS.held_out
        noun = "uuid" if variant == 3 else "number"
        needle = f" The special magic {noun} for {key} is:{answer}."
        assert told.count(needle) == 1
        assert text.endswith(f"? The special magic {noun} for {key} is:{answer}")
        before = len(materials.encode(told[: told.index(needle)]))
        haystack = len(materials.encode(told.replace(needle, "")))
        assert abs(before / haystack - depth) < 0.08
        if variant < 3:
            assert answer.strip().isdecimal()


def test_items_take_the_depths_in_turn(corpus: Corpus, materials: Materials) -> None:
    task = needle_task(materials, 1, 400, [0.0, 1.0], items=4, seed=1)
    texts = [corpus.decode(row.input_ids) for row in task.rows]
    assert [text.startswith(" The special") for text in texts] == [True, False, True, False]


def test_needles_fit_long_contexts_of_a_small_store(materials: Materials) -> None:
    (row,) = needle_task(materials, 2, 40_000, [0.5], items=1, seed=1).rows
    assert row.input_ids.shape == (40_000,)
    assert EOS_ID not in row.input_ids


def test_key_value_answers_are_those_of_the_list(corpus: Corpus, materials: Materials) -> None:
    for row in key_value_task(materials, pairs=6, context_length=300, items=5, seed=1).rows:
        assert row.input_ids.shape == (300,)
        text = corpus.decode(row.input_ids)
        answer = corpus.decode(row.input_ids[row.target_mask])
        key = text.rsplit("\n", 1)[1].split(":")[0]
        assert text.endswith(f"\nWhat is the value for {key}?\n{key}:{answer}")
        assert text.count(f"\n{key}:{answer}\n") == 1
        assert sum(f"\n{word}: " in text for word in WORDS.held_out) == 6


def test_last_words_occur_earlier_and_are_the_only_target(corpus: Corpus, held_out: HeldOut) -> None:
    task = last_word_task(held_out.documents, held_out.materials, items=10, seed=1)
    documents = corpus.decode(corpus.store.ids).split("<|endoftext|>")
    for row in task.rows:
        passage = corpus.decode(row.input_ids)
        answer = corpus.decode(row.input_ids[row.target_mask])
        assert passage.endswith(answer)
        assert any(f"{passage}." in document for document in documents)
        assert answer.strip() in passage.rsplit(".", 1)[0]
        assert row.target_mask[-row.target_mask.sum() :].all()


def test_one_long_document_is_enough_for_many_items(corpus: Corpus, materials: Materials) -> None:
    one = ArrayStore(corpus.store.ids[: corpus.store.document_offsets[1]])
    assert len(last_word_task(one, materials, items=40, seed=1).rows) == 40
    assert len(next_sentence_task(one, materials, items=40, seed=1).items) == 40


def test_the_true_next_sentence_is_marked_correct(corpus: Corpus, held_out: HeldOut) -> None:
    task = next_sentence_task(held_out.documents, held_out.materials, items=12, seed=1)
    documents = corpus.decode(corpus.store.ids).split("<|endoftext|>")
    for item in task.items:
        texts = [corpus.decode(row.input_ids) for row in item.rows]
        assert len(set(texts)) == 4
        assert [any(text in document for document in documents) for text in texts].index(True) == item.correct
        for row, size in zip(item.rows, item.sizes, strict=True):
            continuation = corpus.decode(row.input_ids[row.target_mask])
            assert continuation.startswith(" The old ")
            assert len(continuation.encode()) == size + 1


def test_a_constant_scorer_is_at_chance_in_next_sentence(held_out: HeldOut) -> None:
    task = next_sentence_task(held_out.documents, held_out.materials, items=16, seed=1)
    metrics = evaluate([task], oracle, 4096)[task.name]
    assert metrics["score"] == 0.25
    assert metrics["probability"] == pytest.approx(0.25)


def test_next_sentence_is_won_by_log_probability_per_byte(held_out: HeldOut) -> None:
    task = next_sentence_task(held_out.documents, held_out.materials, items=8, seed=1)
    correct = {item.rows[item.correct].input_ids.tobytes() for item in task.items}

    def knowing(batch: ScoreBatch) -> TokenScores:
        known = [
            ids[: np.flatnonzero(mask)[-1] + 1].tobytes() in correct
            for ids, mask in zip(batch.input_ids, batch.target_mask, strict=True)
        ]
        worse = np.where(np.array(known), -1.0, -2.0)[:, None]
        return TokenScores(np.where(batch.target_mask, worse, 0.0).astype(np.float32), batch.target_mask)

    metrics = evaluate([task], knowing, 1000)[task.name]
    assert metrics["score"] == 1.0
    assert metrics["answer_log_probability"] == -1.0
    assert 0.25 < metrics["probability"] < 1.0


def test_perplexity_of_a_uniform_scorer_is_the_vocabulary(corpus: Corpus) -> None:
    task = perplexity_task(corpus.store, 128, windows=5)
    metrics = evaluate([task], uniform, 300)[task.name]
    assert metrics["perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)
    assert metrics["score"] == pytest.approx(1 / VOCABULARY, rel=1e-5)
    assert metrics["items"] == 5.0
    starts = [
        int(
            np.flatnonzero(
                (np.lib.stride_tricks.sliding_window_view(corpus.store.ids, 128) == row.input_ids).all(1)
            )[0]
        )
        for row in task.rows
    ]
    assert all(start % 128 == 0 for start in starts)
    assert len(set(starts)) == 5


def rows_of(lengths: Sequence[int]) -> list[TokenRow]:
    rng = Random(1)
    return [
        TokenRow(np.array([rng.randrange(1, 1000) for _ in range(length)]), np.arange(length) >= length // 2)
        for length in lengths
    ]


def test_batches_hold_similar_lengths_and_scores_come_back_in_order() -> None:
    rows = rows_of([9, 4, 30, 5, 4, 10])
    batches = list(batches_of(rows, tokens_per_batch=20))
    assert [batch.input_ids.shape for batch in batches] == [(3, 5), (2, 10), (1, 30)]
    assert all(not batch.target_mask[:, 0].any() for batch in batches)
    echo = [
        TokenScores(
            np.where(b.target_mask, b.input_ids, 0).astype(np.float32), b.target_mask & (b.input_ids % 2 == 0)
        )
        for b in batches
    ]
    for row, scores in zip(rows, scores_of(rows, echo), strict=True):
        targets = row.input_ids[row.target_mask]
        np.testing.assert_array_equal(scores.log_probability, targets.astype(np.float32))
        np.testing.assert_array_equal(scores.is_greedy, targets % 2 == 0)


def test_missing_scores_are_noticed() -> None:
    rows = rows_of([4, 4])
    (batch,) = batches_of(rows, 100)
    half = TokenScores(np.zeros((1, 4), np.float32), batch.target_mask[:1])
    with pytest.raises(RuntimeError, match="1 rows were scored, but the task has 2"):
        scores_of(rows, [half])


def test_grid_has_a_row_per_cell(materials: Materials) -> None:
    def remembers_the_last_200_tokens(batch: ScoreBatch) -> TokenScores:
        told_late = batch.input_ids.shape[1] <= 200
        return oracle(batch) if told_late else uniform(batch)

    rows = [
        cell
        for context in (200, 300)
        for depth in (0.25, 0.75)
        for cell in needle_cells(
            materials, remembers_the_last_200_tokens, context, depth, items=2, seed=1, tokens_per_batch=512
        )
    ]
    assert len(rows) == 12
    assert rows[0] == {
        "task": "niah_single_1",
        "context_length": 200,
        "depth": 0.25,
        "score": 1.0,
        "items": 2,
    }
    assert [row["score"] for row in rows] == [1.0] * 6 + [0.0] * 6


def test_models_scored_together_get_their_own_metrics(held_out: HeldOut) -> None:
    tasks = task_suite(held_out, "selection", context_length=256, items=4, seed=1)
    first, second = evaluate_models(tasks, lambda batch: [oracle(batch), uniform(batch)], 1024)
    assert first == evaluate(tasks, oracle, 4096)
    assert second == evaluate(tasks, uniform, 256)
    assert group_score(tasks, first, "recall") == 1.0
    assert group_score(tasks, first, "commonsense") == (1.0 + 0.25) / 2


def test_suites_name_their_groups(held_out: HeldOut) -> None:
    tasks = task_suite(held_out, "evaluation", context_length=256, items=2, seed=1)
    assert [(task.name, task.group) for task in tasks] == [
        ("niah_single_1", "recall"),
        ("niah_single_2", "recall"),
        ("niah_single_3", "recall"),
        ("local_key_value", "recall"),
        ("local_next_sentence", "commonsense"),
        ("local_last_word", "commonsense"),
        ("local_perplexity", "perplexity"),
    ]


def test_tasks_that_do_not_fit_say_so(corpus: Corpus, materials: Materials) -> None:
    with pytest.raises(
        ValueError, match=r"niah_single_2 needs a context_length of at least \d+ tokens, not 20"
    ):
        needle_task(materials, 2, 20, [0.5], items=1, seed=1)
    with pytest.raises(ValueError, match=r"6 pairs take .* but context_length is 60"):
        key_value_task(materials, 6, 60, items=1, seed=1)
    with pytest.raises(ValueError, match="99 pairs need as many words, but the list has 12"):
        key_value_task(materials, 99, 6000, items=1, seed=1)
    with pytest.raises(ValueError, match="but context_length is 10000000"):
        perplexity_task(corpus.store, 10_000_000, windows=1)


def test_held_out_text_without_sentences_says_so(materials: Materials) -> None:
    numbers = ArrayStore(np.array([*materials.encode("17 18 19 20"), EOS_ID], np.uint32))
    with pytest.raises(
        ValueError, match="local_last_word: the held-out documents have no suitable sentences"
    ):
        last_word_task(numbers, materials, items=4, seed=1)
    with pytest.raises(
        ValueError, match="local_next_sentence: the held-out documents have no suitable sentences"
    ):
        next_sentence_task(numbers, materials, items=4, seed=1)


def test_sentences_are_told_from_tables() -> None:
    assert split_sentences("One  here.\nTwo there!  Three?\n") == ["One here.", "Two there!", "Three?"]
    assert is_prose("The river rose above the old bridge.", 10, 100)
    assert not is_prose("Usage: --a=1 --b=2 | 3 + 4 == 7.", 10, 100)
    assert not is_prose("the river rose above the old bridge.", 10, 100)
    assert not is_prose("The river rose above the old bridge.", 10, 20)
    assert not is_prose("", 0, 10)
    assert is_prose("Was it the old bridge?", 10, 100)
