"""The training loop of every stage: batches in, checkpoints and metrics out, exact resume."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from rich.console import Console

from durable_files import write_json
from halo_jobs.recipe import TrainingSection
from halo_jobs.training.batches import BatchCursor
from halo_jobs.training.checkpoints import KeyFilter, TrainingCheckpoints
from halo_jobs.training.guard import DivergenceGuard, TrainingDiverged
from halo_jobs.training.objectives import Objective, gather_weights
from halo_jobs.training.optimizer import build_optimizer, set_learning_rate
from halo_jobs.training.progress import MetricsLog, ProgressReporter, StepMetrics
from halo_jobs.training.schedule import learning_rate


@dataclass
class Trainer:
    """Trains `objective` for `section.steps` steps in `folder`, from the newest valid checkpoint there.

    `keep_keys` restricts checkpoints to the tensors that are trained (alignment leaves the teacher out).
    """

    title: str
    section: TrainingSection
    objective: Objective
    cursor: BatchCursor
    folder: Path
    console: Console
    keep_keys: KeyFilter | None = None

    def __post_init__(self) -> None:
        self.model = self.objective.model
        self.checkpoints = TrainingCheckpoints(self.folder / "checkpoints")
        self.guard = DivergenceGuard(self.section.spike_factor)
        self._is_first = dist.get_rank() == 0

    def run(self) -> dict[str, Any]:
        """Train to the end; returns a summary (steps, tokens, final loss, tokens per second)."""
        optimizer = build_optimizer(self.objective.chunks, self.section)
        first_step = self._resume(optimizer)
        log = MetricsLog(self.folder, resume_step=first_step, writes=self._is_first)
        reporter = ProgressReporter(self.title, self.section.steps, self.console)
        self.model.train()
        try:
            with reporter.live():
                summary = self._loop(optimizer, first_step, log, reporter)
        except TrainingDiverged as problem:
            if self._is_first:
                self._save_bad_batch(problem)
            raise
        finally:
            log.close()
        return summary

    def _resume(self, optimizer: MegatronOptimizer) -> int:
        step, damage = self.checkpoints.newest_valid()
        for sentence in damage:
            self.console.print(f"[yellow]{self.title}: skipping a damaged checkpoint: {sentence}")
        if step is None:
            return 0
        restored = self.checkpoints.load(step, self.model, optimizer, self.keep_keys)
        self.guard.recent = deque(restored["recent_losses"])
        self.console.print(
            f"{self.title}: resuming after step {step} of {self.section.steps}", highlight=False
        )
        return step

    def _loop(
        self, optimizer: MegatronOptimizer, first_step: int, log: MetricsLog, reporter: ProgressReporter
    ) -> dict[str, Any]:
        started = time.monotonic()
        loss = float("nan")
        for step in range(first_step, self.section.steps):
            loss, gradient_norm = self._step(optimizer, step)
            elapsed = time.monotonic() - started
            done = step + 1
            metrics = StepMetrics(
                step=done,
                loss=loss,
                learning_rate=learning_rate(self.section, step),
                gradient_norm=gradient_norm,
                tokens_per_second=(done - first_step) * self.section.tokens_per_step / elapsed,
                elapsed_seconds=log.elapsed_before + elapsed,
                consumed_samples=done * self.section.global_batch,
                consumed_tokens=done * self.section.tokens_per_step,
            )
            log.write(metrics)
            reporter.update(done, f"loss {loss:.4g}  {metrics.tokens_per_second:,.0f} tokens/s")
            if done % self.section.checkpoint_every == 0 and done < self.section.steps:
                self._checkpoint(done, optimizer)
        gather_weights(self.objective.chunks)
        return {
            "steps": self.section.steps,
            "tokens": self.section.steps * self.section.tokens_per_step,
            "final_loss": loss,
            "train_seconds": log.elapsed_before + time.monotonic() - started,
        }

    def _step(self, optimizer: MegatronOptimizer, step: int) -> tuple[float, float]:
        """One optimizer step; returns (loss, gradient norm before clipping)."""
        batches = self.cursor.batches(step)
        samples = tuple(self.cursor.global_samples(step))
        set_learning_rate(optimizer, learning_rate(self.section, step))
        for chunk in self.objective.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss = float(self.objective.accumulate(batches))
        self.guard.check_loss(loss, step=step, samples=samples)
        _, gradient_norm, _ = optimizer.step()
        self.guard.check_gradient(float(gradient_norm), step=step, samples=samples)
        return loss, float(gradient_norm)

    def _checkpoint(self, step: int, optimizer: MegatronOptimizer) -> None:
        gather_weights(self.objective.chunks)
        extra = {"recent_losses": list(self.guard.recent)}
        self.checkpoints.save(step, self.model, optimizer, extra, self.keep_keys)

    def _save_bad_batch(self, problem: TrainingDiverged) -> None:
        windows = [self.cursor.sampler.window(sample) for sample in problem.samples]
        write_json(
            self.folder / "bad_batch.json",
            {
                "step": problem.step + 1,
                "problem": str(problem),
                "windows": [
                    {"sample": sample, "source": window.source, "position": window.position}
                    for sample, window in zip(problem.samples, windows, strict=True)
                ],
            },
        )
