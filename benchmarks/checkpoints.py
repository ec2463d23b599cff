"""Measures how long a checkpoint stalls training: saved in the background, and saved while training waits.

    python benchmarks/checkpoints.py --model hypenet-2b --out results/

Trains a hybrid with random weights on random tokens, with fp32 master weights and Adam's moments. Saves twice in the
background and once while training waits. The stall is the time from the start of a save to its publication, less that
of as many typical steps; the result also has the median step before and during the save. Checks that a background save
loads and equals the state at its start. Needs free disk for two checkpoints (27 GB each for hypenet-2b) and, if the GPU
has no room for a copy, main memory for one. Writes checkpoints.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from rich.console import Console
from rich.table import Table

from halo_jobs.recipe import TrainingSection
from halo_training.batches import TokenBatch
from halo_training.checkpointing.folder import TrainingCheckpoints, current_layout
from halo_training.checkpointing.saver import BackgroundSaver
from halo_training.objectives import NextTokenObjective
from halo_training.optimizer import build_optimizer
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import build_model
from hypenet_megatron.presets import HYPENET_PRESETS, HypeNetPreset, ModelShape
from hypenet_megatron.runtime import model_parallel

TINY = HypeNetPreset("tiny", ModelShape("tiny", 4, 128, 256, 4, 2, 32, 512, True), (0,), 500.0)
STEPS_WITHOUT = 8


class Training:
    """Trains one model on the same random batch in every step."""

    def __init__(self, preset: HypeNetPreset, context_length: int, device: torch.device):
        mixers = preset.shape.hybrid_mixers(preset.attention_layers, "lightning")
        config = DecoderConfig.from_shape(preset.shape, mixers, dtype=torch.bfloat16)
        self.model = build_model(config).to(device)
        self.objective = NextTokenObjective(self.model)
        section = TrainingSection(
            steps=1, context_length=context_length, global_batch=1, micro_batch=1, learning_rate=1e-5
        )
        self.optimizer: MegatronOptimizer = build_optimizer(self.objective.chunks, section)
        ids = torch.randint(preset.shape.vocab_size, (1, context_length + 1), device=device)
        weights = torch.ones(1, context_length, device=device)
        self.batch = TokenBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights)

    def step(self, saver: BackgroundSaver | None = None) -> float:
        """Take one step; returns its duration in seconds."""
        started = time.perf_counter()
        for chunk in self.objective.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = float(self.objective.accumulate([self.batch]))
        if saver is not None:
            saver.before_update()
        self.optimizer.step()
        torch.cuda.synchronize()
        assert loss == loss, "the loss is no number"
        return time.perf_counter() - started


def state(step: int) -> dict[str, Any]:
    """The keys of TRAINING.json that loading a checkpoint needs."""
    return {"step": step, "optimizer_step": step, "layout": current_layout()}


def save_beside(training: Training, saver: BackgroundSaver, number: int, usual: float) -> dict[str, float]:
    """Save while training continues and return timings in seconds. First waits for removal of the old checkpoint."""
    saver.wait_for_removal()
    started = time.perf_counter()
    saver.begin(number, training.model, training.optimizer, state(number))
    begun = time.perf_counter() - started
    steps = []
    while saver.busy or not steps:
        steps.append(training.step(saver))
    publishing = time.perf_counter()
    saver.publish_written()
    ended = time.perf_counter()
    typical = statistics.median(steps)
    return {
        "stall": ended - started - len(steps) * typical,
        "begin": begun,
        "publish": ended - publishing,
        "longest step": max(steps),
        "median step": typical,
        "median step before": usual,
        "steps meanwhile": len(steps),
        "whole": ended - started,
    }


def check(
    training: Training, saver: BackgroundSaver, checkpoints: TrainingCheckpoints, usual: float
) -> tuple[dict[str, float], int]:
    """Check that the first background save holds the state at its start. Returns its timings and its size in bytes."""
    before = {name: x.detach().to("cpu", copy=True) for name, x in training.model.named_parameters()}
    times = save_beside(training, saver, 1, usual)
    assert any(not torch.equal(before[name], x.cpu()) for name, x in training.model.named_parameters())
    checkpoints.load(1, training.model, training.optimizer, None)
    for name, x in training.model.named_parameters():
        assert torch.equal(before[name], x.cpu()), f"{name} is not what was saved"
    return times, sum(path.stat().st_size for path in checkpoints.path(1).iterdir())


def save_waiting(training: Training, saver: BackgroundSaver, number: int) -> dict[str, float]:
    saver.wait_for_removal()
    started = time.perf_counter()
    saver.begin(number, training.model, training.optimizer, state(number))
    saver.finish()
    return {"stall": time.perf_counter() - started}


def measure(
    preset: HypeNetPreset, context_length: int, folder: Path, device: torch.device, console: Console
) -> dict[str, Any]:
    training = Training(preset, context_length, device)
    checkpoints = TrainingCheckpoints(folder / "checkpoints", keep_last=1)
    saver = BackgroundSaver(checkpoints, None)
    console.log("the first steps")
    for _ in range(3):
        training.step()
    usual = statistics.median(training.step() for _ in range(STEPS_WITHOUT))
    console.log("save beside the training, the first one: what it loads is checked")
    times, size = check(training, saver, checkpoints, usual)
    console.log(times)
    usual = statistics.median(training.step() for _ in range(STEPS_WITHOUT))
    console.log("save beside the training")
    beside = [times, save_beside(training, saver, 2, usual)]
    console.log(beside[-1])
    console.log("save while the training waits")
    waiting = [save_waiting(training, saver, 3)]
    return {
        "parameters": sum(x.numel() for x in training.model.parameters()),
        "bytes": size,
        "seconds per step": usual,
        "beside the training": beside,
        "training waits": waiting,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    presets = {**HYPENET_PRESETS, "tiny": TINY}
    parser.add_argument("--model", choices=presets, default="hypenet-2b")
    parser.add_argument("--context-length", type=int, default=4096, help="tokens per step (default 4096)")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints.json")
    parser.add_argument(
        "--disk", type=Path, help="where checkpoints are written (default: a temporary folder)"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    with model_parallel(seed=1) as device, TemporaryDirectory(dir=options.disk) as folder:
        results = measure(presets[options.model], options.context_length, Path(folder), device, console)
    results["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    results["torch"] = torch.__version__
    (options.out / "checkpoints.json").write_text(json.dumps(results, indent=1))
    title = f"{options.model}: {results['parameters'] / 1e9:.2f}B parameters, {results['bytes'] / 1e9:.1f} GB"
    table = Table("", "stall s", "whole save s", "steps meanwhile", title=title)
    for name in ("beside the training", "training waits"):
        for number, save in enumerate(results[name]):
            whole = save.get("whole", save["stall"])
            meanwhile = str(save.get("steps meanwhile", 0))
            table.add_row(f"{name}, {number + 1}", f"{save['stall']:.3f}", f"{whole:.2f}", meanwhile)
    console.print(table, f"a step without a save: {results['seconds per step']:.3f} s")


if __name__ == "__main__":
    main()
