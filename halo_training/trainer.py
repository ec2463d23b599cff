"""The training loop of all stages. Resumes exactly from the newest valid checkpoint."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from rich.console import Console
from rich.text import Text

from durable_files import write_json
from halo_cluster import StageRecord, StopRequested
from halo_cluster.record import CHECKPOINTS
from halo_training.batches import BatchCursor
from halo_training.checkpointing import BackgroundSaver, TrainingCheckpoints
from halo_training.checkpointing.code_version import code_version
from halo_training.checkpointing.folder import current_layout
from halo_training.guard import DivergenceGuard, TrainingDiverged
from halo_training.objectives import Objective, gather_weights
from halo_training.optimizer import build_optimizer, set_learning_rate
from halo_training.progress import MetricsLog, ProgressReporter, peak_memory
from halo_training.schedule import learning_rate
from halo_training.settings import TrainingSection
from halo_training.supervision import BY_FILE, PeerLost, StopRequests, Watchdog, is_lost_peer
from sharded_tensors.ranks import highest
from sharded_tensors.reader import NameFilter

_REPORTED_WAIT_SECONDS = 10.0


class AttemptInProgress(Protocol):
    """The part of an attempt that the trainer uses: its record, its folder, and a way to report a failure."""

    @property
    def record(self) -> StageRecord: ...

    @property
    def folder(self) -> Path: ...

    def fail(self, reason: str) -> None: ...


@dataclass
class Trainer:
    """Trains `objective` for `section.steps` steps, from the newest valid checkpoint in `folder`. Runs on every rank.

    `keep_keys` restricts checkpoints to the trained tensors (alignment leaves out the teacher). If the watchdog ends
    the run, the stacks and the reason go to `attempt`, or to `folder` without one.
    """

    title: str
    section: TrainingSection
    objective: Objective
    cursor: BatchCursor
    folder: Path
    console: Console
    keep_keys: NameFilter | None = None
    attempt: AttemptInProgress | None = None

    def __post_init__(self) -> None:
        self.model = self.objective.model
        self.checkpoints = TrainingCheckpoints(
            self.folder / CHECKPOINTS, self.section.keep_checkpoints, self.section.keep_checkpoint_every
        )
        self.saver = BackgroundSaver(self.checkpoints, self.keep_keys)
        self.stop = StopRequests(self.folder)
        self.guard = DivergenceGuard(self.section.spike_factor)
        self._is_first = dist.get_rank() == 0
        if not self._is_first:
            self.console = Console(quiet=True)

    def run(self) -> dict[str, Any]:
        """Train to the last step. Returns a summary: steps, tokens, final loss, seconds.

        Raises TrainingDiverged, StopRequested after the step is saved, PeerLost if another rank is gone, and ValueError
        if the checkpoint belongs to another training.
        """
        # A scheduler that ends the rest when one rank is gone must not keep us from saying that it is.
        with self.stop.accepted(), self._watched() as self.watchdog:
            self.optimizer = build_optimizer(self.objective.chunks, self.section)
            first_step = self._resume()
            log = MetricsLog(self.folder, resume_step=first_step, writes=self._is_first)
            self.model.train()
            try:
                return self._loop(first_step, log)
            except TrainingDiverged as problem:
                self.saver.finish()
                if self._is_first:
                    self._save_bad_batch(problem)
                raise
            finally:
                log.close()
                self.saver.wait_for_removal()  # the next trainer may start by cleaning up the same folder

    @contextmanager
    def _watched(self) -> Iterator[Watchdog]:
        """Run under the watchdog. Errors that a lost rank causes become PeerLost."""
        with Watchdog(
            self.title,
            self.section.watchdog_seconds,
            self.attempt.folder if self.attempt else self.folder,
            self.attempt.fail if self.attempt else None,
        ) as watchdog:
            try:
                yield watchdog
            except RuntimeError as error:
                if not is_lost_peer(error):
                    raise
                raise PeerLost(
                    f"{watchdog.lost_peers() or 'another rank'} has ended; its own message says why, or the kernel log "
                    "if memory ran out; the same command resumes from the last checkpoint"
                ) from error

    def _resume(self) -> int:
        step, damage = self.checkpoints.newest_valid()
        for sentence in damage:
            warning = Text(f"{self.title}: skipping a damaged checkpoint: {sentence}", "yellow")
            self.console.print(warning, soft_wrap=True)
        self.checkpoints.set_damaged_aside(step)
        if step is None:
            return 0
        restored = self.checkpoints.load(step, self.model, self.optimizer, self.keep_keys)
        self.saver.published = step
        self._check_same_training(step, restored)
        self.guard.recent = deque(restored["recent_losses"])
        self.console.print(
            f"{self.title}: resuming after step {step} of {self.section.steps}", highlight=False
        )
        if restored["code_version"] != code_version():
            self.console.print(
                f"{self.title}: the checkpoint was saved by code {restored['code_version']}, but this is "
                f"{code_version()}; results may differ from here on",
                highlight=False,
            )
        return step

    def _check_same_training(self, step: int, restored: dict[str, Any]) -> None:
        place = self.checkpoints.path(step)
        for key, now in self.section.result_settings().items():
            saved = restored["section"].get(key)
            if saved != now:
                raise ValueError(
                    f"{place} was saved with {key} {saved}, but the recipe says {now}; restore the recipe, or "
                    f"remove {self.checkpoints.folder} to train from the start"
                )
        now = self._recipe_hash()
        if now and restored["recipe_hash"] not in ("", now):
            raise ValueError(
                f"{place} was saved for the inputs {restored['recipe_hash']}, but these are {now}; "
                f"remove {self.checkpoints.folder} to train from the start"
            )

    def _recipe_hash(self) -> str:
        return self.attempt.record.input_hash if self.attempt else ""

    def _loop(self, first_step: int, log: MetricsLog) -> dict[str, Any]:
        started = time.monotonic()
        self.watchdog.progress(first_step)
        loss = self.guard.recent[-1] if self.guard.recent else float("nan")
        with ProgressReporter(self.title, self.section.steps, self.console).live() as reporter:
            for step in range(first_step, self.section.steps):
                loss, gradient_norm = self._step(step)
                elapsed = time.monotonic() - started
                done = step + 1
                speed = (done - first_step) * self.section.tokens_per_step / elapsed
                host_memory, gpu_memory = peak_memory()
                log.write(
                    {
                        "step": done,
                        "loss": loss,
                        "learning_rate": learning_rate(self.section, step),
                        "gradient_norm": gradient_norm,
                        "tokens_per_second": speed,
                        "elapsed_seconds": log.elapsed_before + elapsed,
                        "consumed_samples": done * self.section.global_batch,
                        "consumed_tokens": done * self.section.tokens_per_step,
                        "host_memory_bytes": host_memory,
                        "gpu_memory_bytes": gpu_memory,
                    }
                )
                reporter.update(done, f"loss {loss:.4g}  {speed:,.0f} tokens/s")
                self.watchdog.progress(done)
                self._between_steps(done)
            self.saver.finish(self.watchdog.progress)
        gather_weights(self.objective.chunks)
        return {
            "steps": self.section.steps,
            "tokens": self.section.steps * self.section.tokens_per_step,
            "final_loss": loss,
            "train_seconds": log.elapsed_before + time.monotonic() - started,
        }

    def _step(self, step: int) -> tuple[float, float]:
        """One optimizer step; returns (loss, gradient norm before clipping)."""
        batches = self.cursor.batches(step)
        samples = tuple(self.cursor.global_samples(step))
        set_learning_rate(self.optimizer, learning_rate(self.section, step))
        for chunk in self.objective.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = float(self.objective.accumulate(batches))
        self.guard.check_loss(loss, step=step, samples=samples)
        self.saver.before_update()
        _, gradient_norm, _ = self.optimizer.step()
        self.guard.check_gradient(float(gradient_norm), step=step, samples=samples)
        return loss, float(gradient_norm)

    def _between_steps(self, done: int) -> None:
        """After a step all ranks agree: publish a finished save, begin a new one, or stop."""
        stop, busy = highest([self.stop.code(), self.saver.busy])
        if self.saver.in_flight and not busy:
            self.saver.publish_written()
        if self._save_is_due(done) or stop:
            self._wait_for_save()
            gather_weights(self.objective.chunks)
            self.saver.begin(done, self.model, self.optimizer, self._training_state(done))
        if done - self.saver.published >= self.section.checkpoint_every:
            self._wait_for_save()  # a kill in the next step would lose more than checkpoint_every
        if stop:
            self.saver.finish(self.watchdog.progress)
            if self._is_first:
                self.stop.file.unlink(missing_ok=True)  # it must not stop the next attempt as well
            raise StopRequested(
                f"{self.title}: stopped by {self.stop.reason(stop)} after step {done} of {self.section.steps}, "
                f"which is saved in {self.checkpoints.path(done)}",
                by_user=stop == BY_FILE,
            )

    def _save_is_due(self, done: int) -> bool:
        """Whether to save after step `done`: twice per `checkpoint_every` steps, so that one save is complete when it
        must be, and at checkpoints that are kept for good."""
        interval, kept = -(-self.section.checkpoint_every // 2), self.section.keep_checkpoint_every
        return done < self.section.steps and (done % interval == 0 or bool(kept and done % kept == 0))

    def _wait_for_save(self) -> None:
        started = time.monotonic()
        self.saver.finish(self.watchdog.progress)
        waited = time.monotonic() - started
        if waited > _REPORTED_WAIT_SECONDS:
            self.console.print(
                f"{self.title}: waited {waited:.0f} s for checkpoint {self.saver.published} to be written; a larger "
                "checkpoint_every lets training continue meanwhile",
                highlight=False,
            )

    def _training_state(self, done: int) -> dict[str, Any]:
        """The state in a checkpoint besides tensors. Data order and learning rate are functions of the step."""
        return {
            "step": done,
            "optimizer_step": done,
            "consumed_samples": done * self.section.global_batch,
            "consumed_tokens": done * self.section.tokens_per_step,
            "section": self.section.model_dump(mode="json"),
            "recipe_hash": self._recipe_hash(),
            "code_version": code_version(),
            "layout": current_layout(),
            "recent_losses": list(self.guard.recent),
        }

    def _save_bad_batch(self, problem: TrainingDiverged) -> None:
        windows = []
        for sample in problem.samples:
            window = self.cursor.sampler.window(sample)
            windows.append({"sample": sample, "source": window.source, "position": window.position})
        content = {"step": problem.step + 1, "problem": str(problem), "windows": windows}
        write_json(self.folder / "bad_batch.json", content)
