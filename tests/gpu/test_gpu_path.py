"""The whole path on a CUDA device, against the plain forward in float64 on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from halo_evaluation.selection.sweep import LayerSwitch
from halo_jobs.recipe import TrainingSection
from halo_training.checkpointing.copies import HeldCopies
from halo_training.models import is_student_key
from halo_training.objectives import (
    AlignmentObjective,
    DistillationObjective,
    NextTokenObjective,
    Objective,
)
from halo_training.trainer import Trainer
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import DecoderModel
from hypenet_megatron.runtime import model_parallel, reset_seeds
from hypenet_tools.hugging_face.mapping import conversion_plan, megatron_shapes
from hypenet_tools.hugging_face.weights import SafetensorsWeights
from hypenet_tools.model_weights import load_weights
from hypenet_tools.release import write_hf_folder
from sharded_tensors.views import TensorsInMemory
from sharded_tensors.writer import FileTensor, TensorFile
from tests.support.reference_model import hypenet_forward
from tests.support.tiny_models import HYBRID, TINY
from tests.support.windows import RandomWindows, cursor_of_this_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]

SHAPE = replace(TINY, hidden_size=64, head_dim=64)  # the kernels take 64 and 128
TEACHER = SHAPE.teacher_mixers()
LOGITS_SCALING_BASE = 9.0
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative L2


@pytest.fixture
def device():
    with model_parallel(seed=1) as device:
        yield device


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(88, (2, 150), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """The hybrid as a Hugging Face folder, its weights rounded to what bf16 can hold."""
    folder = tmp_path / "hybrid"
    write_hf_folder(
        folder,
        _tensors(HYBRID),
        SHAPE,
        HYBRID,
        logits_scaling_base=LOGITS_SCALING_BASE,
        tokenizer_folder=_tokenizer(tmp_path / "tokenizer"),
        dtype=torch.float32,
        model_card="",
    )
    return folder


def _tokenizer(folder: Path) -> Path:
    folder.mkdir()
    tokenizer = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"<end>": 0}, "unk_token": "<end>"},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<end>"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _tensors(mixers: tuple[str, ...]) -> dict[str, Tensor]:
    """Random Megatron tensors, norms around one, so rounded that bf16 and fp32 models start equal."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, size in megatron_shapes(conversion_plan(SHAPE, mixers)).items():
        noise = torch.randn(size, generator=generator)
        tensors[name] = (1 + 0.1 * noise if len(size) == 1 else 0.1 * noise).bfloat16().float()
    return tensors


def _relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def _logits(model: DecoderModel, ids: Tensor, device: torch.device) -> Tensor:
    model.to(device).eval()
    return model.logits(model(ids.to(device))).transpose(0, 1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_hybrid_logits(device, export, ids, dtype):
    config = DecoderConfig.from_shape(
        SHAPE, HYBRID, dtype=dtype, logits_scaling_base=LOGITS_SCALING_BASE
    )
    model = DecoderModel(config)
    load_weights(_tensors(HYBRID), model)
    found = _logits(model, ids, device)
    reference = json.loads((export / "config.json").read_text())
    expected = hypenet_forward(SafetensorsWeights(export), reference, ids)
    assert found.device.type == device.type
    assert _relative_error(found, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_teacher_logits(device, tmp_path, ids, dtype):
    tensors = _tensors(TEACHER)
    write_hf_folder(
        tmp_path / "teacher",
        tensors,
        SHAPE,
        None,
        tokenizer_folder=_tokenizer(tmp_path / "tokenizer"),
        dtype=torch.float32,
        model_card="",
    )
    judge = Qwen3ForCausalLM.from_pretrained(tmp_path / "teacher").eval()
    model = DecoderModel(DecoderConfig.from_shape(SHAPE, TEACHER, dtype=dtype))
    load_weights(tensors, model)
    with torch.no_grad():
        expected = judge(ids).logits
    assert _relative_error(_logits(model, ids, device), expected) <= TOLERANCE[dtype]


SECTION = TrainingSection(
    steps=3,
    context_length=64,
    global_batch=4,
    micro_batch=2,
    learning_rate=1e-3,
    warmup_steps=1,
    checkpoint_every=4,
)


def _objective(kind: str, device: torch.device) -> Objective:
    reset_seeds(3)
    options = {"dtype": torch.bfloat16, "init_method_std": 0.1}
    hybrid = DecoderConfig.from_shape(SHAPE, HYBRID, **options)
    teacher = DecoderModel(
        DecoderConfig.from_shape(SHAPE, TEACHER, **options), student="lightning" if kind == "align" else None
    ).to(device)
    match kind:
        case "align":
            return AlignmentObjective(teacher)
        case "pretrain":
            return NextTokenObjective(teacher)
        case "distill":
            return DistillationObjective(DecoderModel(hybrid).to(device), teacher)
    return NextTokenObjective(DecoderModel(hybrid).to(device))


@pytest.mark.parametrize("kind", ["align", "distill", "finetune", "pretrain"])
def test_training_runs_and_resumes(device, tmp_path, kind):
    """bf16 with fp32 master weights. The second run repeats step 3 from the checkpoint after step 2."""
    runs = []
    for _ in range(2):
        objective = _objective(kind, device)
        before = {name: p.detach().clone() for name, p in objective.model.named_parameters()}
        cursor = cursor_of_this_rank(RandomWindows(64, SHAPE.vocab_size), SECTION, device)
        keep = is_student_key if kind == "align" else None
        trainer = Trainer(kind, SECTION, objective, cursor, tmp_path, Console(quiet=True), keep)
        assert np.isfinite(trainer.run()["final_loss"])
        after = dict(trainer.model.named_parameters())
        changed = {name for name in before if not before[name].equal(after[name])}
        assert changed == {name for name in before if kind != "align" or is_student_key(name)}
        runs.append(torch.cat([after[name].detach().flatten() for name in sorted(changed)]))
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3]
    assert _relative_error(runs[1], runs[0]) <= 1e-4  # attention's backward need not be bit-exact on a GPU


def test_sweep_runs_on_the_device(device, ids):
    config = DecoderConfig.from_shape(SHAPE, TEACHER, dtype=torch.bfloat16, init_method_std=0.1)
    switch = LayerSwitch(DecoderModel(config, student="lightning").to(device), device)
    divergence = switch.divergence(ids.to(device))
    assert len(divergence) == SHAPE.num_layers
    assert 0 < min(divergence) <= max(divergence) < float("inf")


@torch.no_grad()
def test_exported_model_pads_on_the_left_and_generates(export, ids):
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=torch.bfloat16)
    model = model.eval().cuda()
    rows = [ids[0, :20].cuda(), ids[1, :97].cuda(), ids[1, :1].cuda()]
    padded = torch.zeros(3, 97, dtype=torch.int64, device="cuda")
    mask = torch.zeros_like(padded)
    for number, row in enumerate(rows):
        padded[number, 97 - len(row) :] = row
        mask[number, 97 - len(row) :] = 1
    together = model(padded, attention_mask=mask).logits
    assert not together.isnan().any()
    for number, row in enumerate(rows):
        single = model(row[None]).logits[0]
        assert _relative_error(together[number, 97 - len(row) :], single) <= TOLERANCE[torch.bfloat16]
    config = json.loads((export / "config.json").read_text())
    expected = hypenet_forward(SafetensorsWeights(export), config, rows[1].cpu()[None])
    assert _relative_error(together[1], expected[0]) <= TOLERANCE[torch.bfloat16]

    generated = model.generate(
        padded, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    assert generated.shape == (3, 105)
    assert generated[:, :97].equal(padded)
    longest = torch.cat([rows[1], generated[1, 97:-1]])
    choice = model(longest[None]).logits[0, 96:].float()
    picked = choice.gather(-1, generated[1, 97:, None])[:, 0]
    # min_new_tokens forbids token 0; a near tie may fall otherwise in bf16 with a cache than without
    assert (picked >= choice[:, 1:].max(-1).values - 0.05 * choice.std()).all()


@pytest.mark.parametrize("room", [True, False], ids=["within the GPU", "in pinned memory"])
def test_a_save_holds_what_was_there_when_it_began(device, tmp_path, monkeypatch, room):
    monkeypatch.setattr(HeldCopies, "_fit_beside_training", lambda self, sources: room)
    copies = HeldCopies()
    for save in range(2):  # the second one finds what the first one left
        source = torch.randn(2**24 + save, device=device)
        expected = source.cpu()
        copies.take({"x": source, "y": source[:3].cpu()})
        copies.before_overwriting()
        source.zero_()
        with copies.complete() as tensors:
            view = TensorsInMemory(tensors)
            TensorFile("x.safetensors", [FileTensor.entire(view, name) for name in view]).write(tmp_path)
        assert load_file(tmp_path / "x.safetensors")["x"].equal(expected)
