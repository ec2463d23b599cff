"""A recipe in several processes as a user starts it, with `halo run`: once undisturbed, once with a rank killed.

The killed run ends by itself, the same command resumes it, and its weights are compared with those of the other. Both
are ended once the training stage is done: what follows has one process only.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from multi_gpu_worlds import Report
from safetensors.torch import load_file

WHOLE, KILLED = "halo run, uninterrupted", "halo run, a rank killed and resumed"
ALLOWED_SECONDS = 60.0
_COMMAND_SECONDS = 400.0
_FAREWELL_SECONDS = 20.0
_STAGE, _EVERY = "pretrain", 10


def recipe(processes: int, *, small: bool) -> dict[str, Any]:
    """A few steps of a teacher from scratch; `small` for CPUs. Fused attention's backward adds up tiles of 128 keys in
    any order, so windows are no longer."""
    layout = {"processes": processes, "distributed_optimizer": True}
    if processes > 2:
        layout |= {"tensor": 2, "sequence_parallel": True}
    return {
        "kind": "pretrain",
        "name": "several-processes",
        "precision": "bf16",
        "tokenizer": "embedded:tokenizer-small",
        "shape": {
            "num_layers": 2 if small else 8,
            "hidden_size": 64 if small else 256,
            "ffn_hidden_size": 128 if small else 768,
            "query_heads": 4,
            "kv_groups": 2,
            "head_dim": 64,
        },
        "corpus": {"train": ["embedded:sotu"], "held_out_share": 0.1, "recall_episodes": 2000},
        "layout": layout,
        _STAGE: {
            "steps": 40 if small else 80,
            "context_length": 128,
            "global_batch": 4 if small else 16,
            "micro_batch": 2,
            "learning_rate": 1e-3,
            "warmup_steps": 5,
            "recall_share": 0.5,
            "checkpoint_every": _EVERY,
            "watchdog_seconds": 120,
        },
        "evaluate": {"contexts": [128], "depths": [0.5], "needle_items": 1, "suite_items": 4},
    }


@dataclass
class HaloRun:
    """A run of the recipe on some of the GPUs, in a thread of its own."""

    name: str
    gpus: int
    scratch: Path
    device: str
    report: Report
    kill: bool
    shares: int = 1
    after: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._results: queue.Queue[dict[str, Any]] = queue.Queue()
        self._process: subprocess.Popen[str] | None = None
        self._given_up = False
        self._lock = threading.Lock()
        """Held where a command is started or ended, so that none starts after the run was given up."""

    @property
    def folder(self) -> Path:
        """Of all its stages."""
        return self.scratch / ("killed" if self.kill else "whole") / "several-processes"

    def prepare(self) -> None:
        """`halo run` starts all of its processes."""

    def begin(self, gpus: Sequence[int]) -> None:
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = listed.split(",") if listed else [str(gpu) for gpu in range(max(gpus) + 1)]
        visible = ",".join(names[gpu] for gpu in gpus) if self.device == "cuda" else ""
        threading.Thread(target=self._run, args=(visible,), daemon=True).start()

    def advance(self) -> bool:
        try:
            self.report(self.name, self._results.get_nowait())
        except queue.Empty:
            return True
        return False

    def abandon(self, reason: str) -> None:
        with self._lock:
            self._given_up = True
        self._end()
        self.report(self.name, {"error": reason})

    def _end(self) -> None:
        """Have no process any more: neither the command nor its ranks, which lead groups of their own."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                return  # a command that ended by itself has ended its ranks
            ranks: list[psutil.Process] = []
            with suppress(psutil.NoSuchProcess):  # it may end just now
                command = psutil.Process(self._process.pid)
                command.suspend()  # it starts nothing more
                ranks = command.children(recursive=True)
            self._process.kill()
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.kill()
            self._process.wait()
            deadline = time.monotonic() + _FAREWELL_SECONDS
            while any(map(_runs, ranks)) and time.monotonic() < deadline:
                time.sleep(0.05)

    def _run(self, visible: str) -> None:
        try:
            result = self._killed(visible) if self.kill else self._whole(visible)
        except Exception as problem:
            result = {"error": f"{type(problem).__name__}: {str(problem)[:600]}"}
        finally:
            self._end()
        self._results.put(result)  # now others may have its GPUs

    def _start(self, visible: str, log: Path) -> None:
        with self._lock:
            if self._given_up:
                raise RuntimeError("given up before it started")
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            content = recipe(self.gpus, small=self.device == "cpu")
            (self.folder.parent / "recipe.yaml").write_text(yaml.safe_dump(content))
            with open(log, "w") as out:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "halo_jobs.cli", "run", "recipe.yaml", "--runs", "."],
                    cwd=self.folder.parent,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": visible, "COLUMNS": "400"},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    text=True,
                )

    def _finish(self, log: Path) -> float:
        """Seconds until the stage is done; then the command is ended. RuntimeError with its last words otherwise."""
        started = time.monotonic()
        assert self._process is not None
        ended = False
        while not any(self.folder.glob(f"{_STAGE}/*/DONE.json")):
            if ended:
                code = self._process.returncode
                raise RuntimeError(f"halo run ended with code {code}: {_last_lines(log, 3)}")
            if time.monotonic() - started > _COMMAND_SECONDS:
                raise RuntimeError(
                    f"{_STAGE} is not done after {_COMMAND_SECONDS:g} s: {_last_lines(log, 3)}"
                )
            time.sleep(0.05)
            ended = self._process.poll() is not None
        seconds = time.monotonic() - started
        self._end()
        return seconds

    def _whole(self, visible: str) -> dict[str, Any]:
        log = self.scratch / "halo-whole.txt"
        self._start(visible, log)
        return {"processes": self.gpus, "seconds": self._finish(log)}

    def _killed(self, visible: str) -> dict[str, Any]:
        log, again = self.scratch / "halo-killed.txt", self.scratch / "halo-resumed.txt"
        self._start(visible, log)
        assert self._process is not None
        # Past a first checkpoint, and not where the next one is due.
        step = self._wait_for_step(_EVERY + _EVERY // 2 - 2, log)
        rank, pid = self._last_rank()
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        code = self._process.wait(_COMMAND_SECONDS)
        seconds = time.monotonic() - killed
        result = {
            "killed": f"rank {rank} of {self.gpus} in {_STAGE}, after step {step}",
            "seconds_until_the_end": seconds,
            "exit_code": code,
            "halo_said": _last_lines(log, 2),
            "ranks_said": self._ranks_said(),
        }
        if code == 0 or seconds > ALLOWED_SECONDS:
            return {**result, "error": f"the others ended with code {code} after {seconds:.0f} s"}
        self._start(visible, again)
        result["resumed_run_seconds"] = self._finish(again)
        resumed = [line.strip() for line in again.read_text().splitlines() if "resuming after step" in line]
        if not resumed:
            return {**result, "error": "the second run did not say that it resumed"}
        return {**result, "resumed": resumed[0]}

    def _wait_for_step(self, step: int, log: Path) -> int:
        """Steps finished, at least `step`; a checkpoint is there."""
        assert self._process is not None
        end = time.monotonic() + _COMMAND_SECONDS
        while time.monotonic() < end:
            for metrics in self.folder.glob(f"{_STAGE}/*/metrics.jsonl"):
                saved = any(
                    metrics.parent.glob("checkpoints/step-????????")
                )  # which takes longer than a few short steps
                if (done := len(metrics.read_text().splitlines())) >= step and saved:
                    return done
            if self._process.poll() is not None or self._given_up:
                break
            time.sleep(0.01)
        raise RuntimeError(f"{_STAGE} did not reach step {step}: {_last_lines(log, 3)}")

    def _last_rank(self) -> tuple[int, int]:
        """Rank and process id of the last process of the stage."""
        assert self._process is not None
        workers = {
            int(child.environ()["RANK"]): child.pid
            for child in psutil.Process(self._process.pid).children(recursive=True)
            if "halo_jobs.worker" in child.cmdline()
        }
        return max(workers.items())

    def _ranks_said(self) -> list[str]:
        """The sentences in the attempt's folder: what the driver recorded, and of the process that spoke first."""
        (attempt,) = self.folder.glob(f"{_STAGE}/*/attempt.*")
        said = [
            str(json.loads(path.read_text()).get("reason"))
            for path in [*attempt.glob("exit.json"), *sorted(attempt.glob("rank-*.json"))]
        ]
        errors = [
            line for path in sorted(attempt.glob("rank-*.txt")) for line in path.read_text().splitlines()
            if line.startswith("error:")
        ]  # fmt: skip
        return [*said, *errors]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _last_lines(log: Path, count: int) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-count:])


def compare_weights(whole: HaloRun, killed: HaloRun) -> dict[str, Any]:
    """Whether all weights that the stage handed on are equal bits, else the largest difference."""
    files = {path.relative_to(whole.folder) for path in whole.folder.glob(f"{_STAGE}/*/*/*.safetensors")}
    if not files:
        return {"error": f"{whole.folder} has no weights of {_STAGE}"}
    largest, equal = 0.0, True
    for path in files:
        first, second = load_file(whole.folder / path), load_file(killed.folder / path)
        assert first.keys() == second.keys(), path
        for key in first:
            equal = equal and first[key].view(torch.uint8).equal(second[key].view(torch.uint8))
            largest = max(largest, float((first[key].double() - second[key].double()).abs().max()))
    if equal:
        return {_STAGE: "equal bits"}
    return {_STAGE: largest, "error": "the weights of the resumed run are others"}
