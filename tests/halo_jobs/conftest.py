"""A tiny tokenizer, corpus and teacher, and a recipe over them: the whole pipeline in seconds."""

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from halo_jobs.recipe import load_recipe
from halo_jobs.stages.data import WORDS_FILE
from hypenet_megatron.presets import ModelShape
from hypenet_tools.hugging_face.mapping import conversion_plan, megatron_shapes
from hypenet_tools.release import write_hf_folder

NOUNS = ["river", "council", "harbour", "winter", "letter", "engine", "garden", "signal", "market", "bridge"]
VERBS = ["crosses", "feeds", "answers", "opens", "follows", "carries", "guards", "moves", "hides", "repeats"]


def _documents(count: int) -> list[str]:
    rng = random.Random(7)

    def sentence() -> str:
        first, second, third = rng.sample(NOUNS, 3)
        return f"The {first} near the {second} {rng.choice(VERBS)} the {third} again."

    return [" ".join(sentence() for _ in range(60)) for _ in range(count)]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}) for text in _documents(60)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([*_documents(20), *WORDS_FILE.read_text().split()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_teacher(folder: Path, tokenizer: Path, *, layers: int) -> Path:
    """A random Qwen3 folder."""
    shape = ModelShape("tiny", layers, 32, 48, 2, 1, 16, 600, tied_embeddings=True, max_positions=512)
    generator = torch.Generator().manual_seed(1)
    plan = conversion_plan(shape, shape.teacher_mixers())
    tensors = {
        name: torch.ones(size) if "norm" in name else torch.randn(size, generator=generator) * 0.1
        for name, size in megatron_shapes(plan).items()
    }
    write_hf_folder(
        folder,
        tensors,
        shape,
        None,
        tokenizer_folder=tokenizer,
        dtype=torch.float32,
        model_card="---\nlicense: apache-2.0\n---\ntiny\n",
    )
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random Qwen3 folder of 4 layers."""
    return write_teacher(tmp_path_factory.mktemp("teacher") / "tiny", tiny_tokenizer, layers=4)


TRAINING = {
    "steps": 6,
    "context_length": 128,
    "global_batch": 4,
    "micro_batch": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "recall_share": 0.5,
    "checkpoint_every": 4,
}


@pytest.fixture(scope="module")
def pipeline_recipe_content(tiny_corpus, tiny_teacher) -> dict:
    return recipe_content(tiny_corpus, tiny_teacher)


@pytest.fixture
def tiny_recipe_content(tiny_corpus, tiny_teacher) -> dict:
    return recipe_content(tiny_corpus, tiny_teacher)


def recipe_content(tiny_corpus: Path, tiny_teacher: Path) -> dict:
    return {
        "name": "tiny",
        "precision": "fp32",
        "teacher": str(tiny_teacher),
        "corpus": {"train": [str(tiny_corpus)], "held_out_share": 0.3},
        "align": TRAINING,
        "select": {"context_length": 128, "items": 4, "baselines": ["uniform"]},
        "distill": TRAINING,
        "finetune": {**TRAINING, "steps": 3},
        "calibrate": {"candidates": [20, 50], "context_length": 96, "windows": 2},
        "evaluate": {"contexts": [128, 160], "depths": [0.5], "needle_items": 2, "suite_items": 4},
    }


@pytest.fixture
def tiny_recipe_file(tmp_path, tiny_recipe_content) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe_content))
    return path


@pytest.fixture
def tiny_recipe(tiny_recipe_file):
    return load_recipe(tiny_recipe_file)
