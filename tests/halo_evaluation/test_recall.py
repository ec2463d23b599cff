from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

import halo_evaluation.recall.store as recall_store
from halo_evaluation.recall import EpisodeGenerator, Materials, load_words, write_recall_store
from halo_evaluation.recall.key_values import CANONICAL as CANONICAL_LIST
from halo_evaluation.recall.key_values import key_value_episode
from halo_evaluation.recall.materials import Segment, join, segment, total_length
from halo_evaluation.recall.needles import CANONICAL, Needle, needle_episode
from halo_evaluation.recall.span_copies import span_copy_episode
from tests.support.proxy_corpus import EOS_ID, WORDS, ArrayStore, Corpus, encode_documents
from tokenized_data import TokenizerIdentity, TokenStore, TokenStoreWriter


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.build(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def materials(corpus: Corpus) -> Materials:
    return corpus.materials(WORDS.training)


def contains(ids: np.ndarray, part: np.ndarray) -> bool:
    windows = (
        np.lib.stride_tricks.sliding_window_view(ids, len(part))
        if len(ids) >= len(part)
        else np.empty((0, 0))
    )
    return bool((windows == part).all(-1).any())


def test_an_episode_depends_on_seed_and_index_alone(corpus: Corpus) -> None:
    after_others = EpisodeGenerator(corpus.materials(WORDS.training), 256, seed=3)
    episodes = [after_others.episode(index) for index in range(8)]
    alone = EpisodeGenerator(corpus.materials(WORDS.training), 256, seed=3).episode(7)
    np.testing.assert_array_equal(alone[0], episodes[7][0])
    np.testing.assert_array_equal(alone[1], episodes[7][1])
    other_seed = EpisodeGenerator(corpus.materials(WORDS.training), 256, seed=4).episode(7)
    assert len({ids.tobytes() for ids, _ in [*episodes, other_seed]}) == 9


@pytest.mark.parametrize(("context_length", "part_counts"), [(64, {1}), (257, {1, 2, 4}), (1024, {1, 2, 4})])
def test_episodes_fill_the_context_and_every_part_ends_with_eos(
    materials: Materials, context_length: int, part_counts: set[int]
) -> None:
    generator = EpisodeGenerator(materials, context_length, seed=1, answer_weight=7)
    seen = set()
    for index in range(60):
        ids, weights = generator.episode(index)
        assert ids.shape == weights.shape == (context_length,)
        assert (ids.dtype, weights.dtype) == (np.int64, np.uint8)
        assert ids[-1] == EOS_ID
        assert set(np.unique(weights)) == {1, 7}
        assert (weights[ids == EOS_ID] == 1).all()
        seen.add(int((ids == EOS_ID).sum()))
    assert seen == part_counts


@pytest.mark.parametrize("kind", [needle_episode, key_value_episode, span_copy_episode])
@pytest.mark.parametrize("length", [120, 500])
def test_every_answer_was_told_before(
    materials: Materials, kind: Callable[[Materials, Random, int], list[Segment] | None], length: int
) -> None:
    answers = 0
    for seed in range(40):
        segments = kind(materials, Random(seed), length)
        if segments is None:
            continue
        assert total_length(segments) == length
        for position, piece in enumerate(segments):
            if piece.is_answer and len(piece.ids):
                told, _ = join(segments[:position])
                assert contains(told, piece.ids)
                answers += 1
    assert answers >= 20


def test_copied_spans_repeat_the_first_occurrence_whole(materials: Materials) -> None:
    for seed in range(30):
        segments = span_copy_episode(materials, Random(seed), 400)
        first, *repeats = [
            np.concatenate([cue.ids, answer.ids])
            for cue, answer in zip(segments[1::3], segments[2::3], strict=True)
        ]
        assert 12 <= len(first) <= 100
        assert len(repeats) in {1, 2}
        for repeat in repeats:
            np.testing.assert_array_equal(repeat, first)


def test_needle_pieces_encode_as_the_whole_text_does(materials: Materials) -> None:
    needle = Needle(CANONICAL, "magic number", "brasky-clilin", "4821907")
    text = " The special magic number for brasky-clilin is: 4821907."
    assert tuple(needle.statement(materials)) == materials.encode(text)
    question, answer = needle.question(materials)
    assert materials.decode(np.concatenate([question.ids, answer.ids])) == (
        "\nWhat is the special magic number for brasky-clilin?"
        " The special magic number for brasky-clilin is: 4821907"
    )
    assert materials.decode(answer.ids) == " 4821907"


def test_key_value_pieces_encode_as_the_whole_text_does(materials: Materials) -> None:
    ids = CANONICAL_LIST.pairs(materials, [("brasky", "0417"), ("clilin", "9982")])
    assert tuple(ids) == materials.encode("\n\nbrasky: 0417\nclilin: 9982\n")
    question, answer = CANONICAL_LIST.ask(materials, "clilin", "9982")
    assert materials.decode(question.ids) == "\nWhat is the value for clilin?\nclilin:"
    assert materials.decode(answer.ids) == " 9982"


def test_held_out_words_never_occur_and_training_words_do(corpus: Corpus, materials: Materials) -> None:
    generator = EpisodeGenerator(materials, 512, seed=2)
    text = " ".join(corpus.decode(generator.episode(index)[0]) for index in range(150))
    assert [word for word in WORDS.held_out if word in text] == []
    assert [word for word in WORDS.training if word not in text] == []


def test_keys_too_long_for_the_context_leave_span_copies(corpus: Corpus) -> None:
    generator = EpisodeGenerator(corpus.materials(("x" * 400, "y" * 400)), 128, seed=1)
    for index in range(20):
        ids, weights = generator.episode(index)
        assert len(ids) == 128
        assert (weights > 1).any()
        assert "xxxx" not in corpus.decode(ids)


def test_prose_is_free_of_eos_and_longer_than_its_source(corpus: Corpus) -> None:
    three_documents = ArrayStore(np.array([5, 6, EOS_ID, 7, EOS_ID, 8, 9, EOS_ID], np.uint32))
    materials = Materials(three_documents, corpus.tokenizer_folder / "tokenizer.json", EOS_ID, WORDS.training)
    prose = materials.prose(Random(1), 50)
    assert prose.shape == (50,)
    assert set(prose.tolist()) == {5, 6, 7, 8, 9}


def test_sentence_ends_are_stops_before_white_space(materials: Materials) -> None:
    ids = np.array(materials.encode("It is 3.5 metres. The river rose.\nThe end."))
    ends = [materials.decode(ids[:end]) for end in materials.sentence_ends(ids)]
    assert [text.rstrip() for text in ends] == [
        "It is 3.5 metres.",
        "It is 3.5 metres. The river rose.",
        "It is 3.5 metres. The river rose.\nThe end.",
    ]
    assert len(materials.sentence_ends(ids[:0])) == 0


def test_join_marks_answers() -> None:
    ids, is_answer = join([segment([1, 2]), segment([3], is_answer=True), segment([]), segment([4])])
    assert ids.tolist() == [1, 2, 3, 4]
    assert is_answer.tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("context_length", "answer_weight", "complaint"),
    [(63, 4, "at least 64"), (64, 0, "1 to 255"), (64, 256, "1 to 255")],
)
def test_impossible_generators_are_refused(
    materials: Materials, context_length: int, answer_weight: int, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        EpisodeGenerator(materials, context_length, seed=1, answer_weight=answer_weight)


def test_an_empty_store_is_refused(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="empty"):
        Materials(ArrayStore(np.zeros(0, np.uint32)), corpus.tokenizer_folder / "tokenizer.json", EOS_ID, ())


def test_words_are_split_at_the_end_of_the_list(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("one\ntwo\nthree\nfour\nfive\n")
    split = load_words(path, held_out=2)
    assert split.training == ("one", "two", "three")
    assert split.held_out == ("four", "five")


@pytest.mark.parametrize(
    ("text", "complaint"), [(None, "missing"), ("a b c a", "'a' twice"), ("a b c", "3 words")]
)
def test_unusable_word_lists_are_refused(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "words.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        load_words(path, held_out=2)
    assert str(path) in str(caught.value)


@pytest.fixture
def haystack(corpus: Corpus, tmp_path: Path) -> TokenStore:
    identity = TokenizerIdentity("tiny", "0" * 64, corpus.tokenizer.get_vocab_size(), EOS_ID)
    with TokenStoreWriter(tmp_path / "prose", identity, provenance={}) as writer:
        for document in encode_documents(corpus.tokenizer):
            writer.add_document(document)
    return TokenStore.open(tmp_path / "prose")


def test_store_is_the_same_with_one_process_and_with_two(
    corpus: Corpus, haystack: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall_store, "_TOKENS_PER_PROCESS", 1)
    stores = [
        write_recall_store(
            tmp_path / f"recall-{workers}",
            haystack,
            corpus.tokenizer_folder,
            WORDS,
            context_length=96,
            episodes=150,
            seed=9,
            workers=workers,
        )
        for workers in (1, 2)
    ]
    assert stores[0].digest == stores[1].digest
    assert stores[0].num_tokens == 150 * 96
    np.testing.assert_array_equal(stores[0].document_offsets, np.arange(151) * 96)
    generator = EpisodeGenerator(corpus.materials(WORDS.training), 96, seed=9)
    for index in (0, 149):
        ids, weights = generator.episode(index)
        for store in stores:
            np.testing.assert_array_equal(store.read(index * 96, 96), ids)
            np.testing.assert_array_equal(store.read_loss_weights(index * 96, 96), weights)
