"""A recipe in several processes as a user starts it, with `halo run`: once undisturbed, once with a rank killed.

The killed run ends by itself, the same command resumes it, and its weights are compared with those of the other. Both
commands are ended once the training stage is done: what follows has one process only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file

Report = Callable[[str, dict[str, Any]], None]
WHOLE, KILLED = "halo run, uninterrupted", "halo run, a rank killed and resumed"
ALLOWED_SECONDS = 60.0
_COMMAND_SECONDS = 400.0
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


def halo_runs(processes: int, scratch: Path, device: str, report: Report) -> None:
    """Both runs, and whether their weights are equal."""
    whole, killed = (HaloRun(scratch / name, processes, device) for name in ("whole", "killed"))
    done = []
    for name, run, work in ((WHOLE, whole, whole.uninterrupted), (KILLED, killed, killed.killed_and_resumed)):
        try:
            result = work()
        except Exception as problem:
            result = {"error": f"{type(problem).__name__}: {str(problem)[:600]}"}
        finally:
            run.end()
        report(name, result)
        done.append("error" not in result)
    if all(done):
        report("weights of the two runs", compare_weights(whole.folder, killed.folder))


class HaloRun:
    """`halo run` of the recipe in a folder of its own."""

    def __init__(self, parent: Path, processes: int, device: str) -> None:
        self.folder, self._parent, self._processes = parent / "several-processes", parent, processes
        self._log = parent / "log.txt"
        self._environment = {**os.environ, "COLUMNS": "400"}
        if device == "cpu":
            self._environment["CUDA_VISIBLE_DEVICES"] = ""
        self._command: subprocess.Popen[bytes] | None = None
        parent.mkdir()
        (parent / "recipe.yaml").write_text(yaml.safe_dump(recipe(processes, small=device == "cpu")))

    def uninterrupted(self) -> dict[str, Any]:
        self._start()
        return {"processes": self._processes, "seconds": self._finish()}

    def killed_and_resumed(self) -> dict[str, Any]:
        command = self._start()
        # Past a first checkpoint, and not where the next one is due.
        step = self._until(lambda: self._saved_steps(_EVERY + _EVERY // 2 - 2), "the step to kill at")
        ranks = {int(process.environ()["RANK"]): process for process in self._ranks()}
        ranks[max(ranks)].kill()
        killed = time.monotonic()
        code = command.wait(_COMMAND_SECONDS)
        seconds = time.monotonic() - killed
        result: dict[str, Any] = {
            "killed": f"rank {max(ranks)} of {self._processes} in {_STAGE}, after step {step}",
            "seconds_until_the_end": seconds,
            "exit_code": code,
            "halo_said": self._last_lines(2),
        }
        if code == 0 or seconds > ALLOWED_SECONDS:
            return {**result, "error": f"the others ended with code {code} after {seconds:.0f} s"}
        self._start()
        result["resumed_run_seconds"] = self._finish()
        resumed = [line.strip() for line in self._log.read_text().splitlines() if "resuming after step" in line]
        return {**result, **({"resumed": resumed[0]} if resumed else {"error": "the second run did not resume"})}

    def end(self) -> None:
        """Have no process any more; ranks end with their parent."""
        if self._command is not None and self._command.poll() is None:
            ranks = self._ranks()
            self._command.send_signal(signal.SIGKILL)
            self._command.wait()
            psutil.wait_procs(ranks, timeout=20)

    def _start(self) -> subprocess.Popen[bytes]:
        with open(self._log, "ab") as out:
            self._command = subprocess.Popen(
                [sys.executable, "-m", "halo_jobs.cli", "run", "recipe.yaml", "--runs", "."],
                cwd=self._parent,
                env=self._environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        return self._command

    def _finish(self) -> float:
        """Seconds until the stage is done; then the command is ended."""
        started = time.monotonic()
        self._until(lambda: any(self.folder.glob(f"{_STAGE}/*/DONE.json")), f"the end of {_STAGE}")
        self.end()
        return time.monotonic() - started

    def _until(self, answer: Callable[[], Any], what: str) -> Any:
        """The first answer that is true; RuntimeError with the last words of a command that ends before."""
        assert self._command is not None
        deadline = time.monotonic() + _COMMAND_SECONDS
        while not (found := answer()):
            if self._command.poll() is not None and not answer():
                raise RuntimeError(f"halo run ended with code {self._command.returncode}: {self._last_lines(3)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {_COMMAND_SECONDS:g} s for {what}: {self._last_lines(3)}")
            time.sleep(0.01)
        return found

    def _saved_steps(self, least: int) -> int:
        """Steps finished once they are `least` and a checkpoint is there; until then 0."""
        for metrics in self.folder.glob(f"{_STAGE}/*/metrics.jsonl"):
            saved = any(metrics.parent.glob("checkpoints/step-????????"))
            if (done := len(metrics.read_text().splitlines())) >= least and saved:
                return done
        return 0

    def _ranks(self) -> list[psutil.Process]:
        assert self._command is not None
        children = psutil.Process(self._command.pid).children(recursive=True)
        return [child for child in children if "halo_jobs.worker" in child.cmdline()]

    def _last_lines(self, count: int) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-count:])


def compare_weights(whole: Path, killed: Path) -> dict[str, Any]:
    """Whether all weights that the stage handed on are equal bits, else the largest difference."""
    files = {path.relative_to(whole) for path in whole.glob(f"{_STAGE}/*/*/*.safetensors")}
    if not files:
        return {"error": f"{whole} has no weights of {_STAGE}"}
    largest, equal = 0.0, True
    for path in files:
        first, second = load_file(whole / path), load_file(killed / path)
        assert first.keys() == second.keys(), path
        for key in first:
            equal = equal and first[key].view(torch.uint8).equal(second[key].view(torch.uint8))
            largest = max(largest, float((first[key].double() - second[key].double()).abs().max()))
    if equal:
        return {_STAGE: "equal bits"}
    return {_STAGE: largest, "error": "the weights of the resumed run are others"}
