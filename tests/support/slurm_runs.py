"""Runs of a tiny recipe on the Slurm sandbox, to be disturbed: where they stand, and what of them may be killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from durable_files import read_json
from halo_cluster.attempts import attempt_folders
from halo_cluster.jobs import LiveJob
from halo_cluster.slurm.queue import live_jobs
from scripts.slurm_sandbox.nodes import processes_of_jobs
from tests.support.cluster_sandbox import SlurmSandbox
from tests.support.halo import checked_halo, halo_command, set_options

TOGETHER = ("layout.processes=2", "layout.pipeline=2", "select.baselines=[]")
ON_SLURM = ("cluster.nodes=2", "cluster.time_minutes=20", "cluster.backoff_seconds=1")
TRAINED = ("align", "distill.hybrid", "finetune.hybrid")


def run_command(recipe: Path, runs: Path, settings: tuple[str, ...], *options: str) -> list[str]:
    return halo_command("run", recipe, "--runs", runs, *set_options(*settings), *options)


def trained_weights(runs: Path, stages: tuple[str, ...] = TRAINED) -> dict[str, dict[str, str]]:
    """Checksums of the weights that training stages published, by stage."""
    records = {path.parent.parent.name: read_json(path) for path in runs.glob("tiny/*/*/DONE.json")}
    return {
        stage: {name: digest for name, digest in records[stage]["outputs"].items() if "safetensors" in name}
        for stage in stages
    }


@dataclass
class SlurmRun:
    """A run with its drivers, and its align stage, which is the one to be disturbed."""

    slurm: SlurmSandbox
    recipe: Path
    runs: Path
    settings: tuple[str, ...]
    drivers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def begin_without_align(self, finished: Path) -> None:
        """Take everything but align from the runs folder `finished`."""
        shutil.copytree(finished / "tiny", self.runs / "tiny")
        shutil.rmtree(self.runs / "tiny" / "align")
        (self.runs / "tiny" / "report.html").unlink()

    def start(self, *settings: str) -> subprocess.Popen[bytes]:
        """Another driver; what it says is in `said`."""
        command = run_command(self.recipe, self.runs, (*self.settings, *settings), "--executor", "slurm")
        with open(self._said(len(self.drivers)), "wb") as out:
            self.drivers.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
        return self.drivers[-1]

    def _said(self, driver: int) -> Path:
        # Not in the folder of runs, which may be on a full disk.
        return self.recipe.with_name(f"{self.runs.parent.name}.driver-{driver}.txt")

    def said(self, driver: int = -1) -> str:
        return self._said(driver % len(self.drivers)).read_text()

    def shown(self, driver: int = -1) -> list[str]:
        """What a driver said about align, without the spaces that make columns."""
        lines = (" ".join(line.split()) for line in self.said(driver).splitlines())
        return [line.replace(f"{self.runs}/", "runs/") for line in lines if line.startswith("align ")]

    def finish(self) -> None:
        """The newest driver has brought the run to its end."""
        assert self.drivers[-1].wait(timeout=300) == 0, self.said()

    def kill_driver(self) -> None:
        self.drivers[-1].kill()
        self.drivers[-1].wait()

    def end(self) -> None:
        for driver in self.drivers:
            driver.kill()
            driver.wait()

    @property
    def folder(self) -> Path:
        (found,) = (self.runs / "tiny" / "align").iterdir()
        return found

    def attempts(self) -> list[Path]:
        return attempt_folders(self.folder) if (self.runs / "tiny" / "align").exists() else []

    def steps(self) -> int:
        """Steps that the training has finished and not lost again."""
        found = list(self.runs.glob("tiny/align/*/metrics.jsonl"))
        lines = found[0].read_text().splitlines() if found else []
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except ValueError:  # being written
                continue
        return 0

    def until_training(self, steps: int = 3, attempts: int = 1) -> None:
        def trains() -> bool:
            assert self.drivers[-1].poll() is None, self.said()
            return len(self.attempts()) >= attempts and self.steps() >= steps

        self.slurm.until(trains, f"step {steps} of align", seconds=120)

    def job(self) -> LiveJob:
        (job,) = [entry for name, jobs in live_jobs().items() if ".align." in name for entry in jobs]
        return job

    def nodes(self) -> list[str]:
        """Of the job that runs; the first is rank 0's."""
        return self.slurm.slurm("scontrol", "show", "hostnames", self.job().nodes).split()

    def processes(self, node: str, module: str) -> list[int]:
        """Processes on the node that were started as `python -m <module>`."""
        wanted = module.encode()
        return [
            pid
            for pid in processes_of_jobs(self.slurm.layout, node)
            if wanted in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        ]

    def rank(self, node: str) -> int:
        (pid,) = self.processes(node, "halo_jobs.worker")
        return pid

    def exits(self) -> list[dict[str, Any]]:
        """How the attempts ended, oldest first; of one that runs, nothing."""
        paths = (folder / "exit.json" for folder in self.attempts())
        return [read_json(path) for path in paths if path.exists()]

    def recovered(self, since: float, attempts: int) -> tuple[str, float]:
        """What `halo status` says once an attempt more than `attempts` has begun, and seconds from `since` (monotonic)
        to the first step that the fault has not let it make before."""
        reached = 0

        def begun() -> bool:
            nonlocal reached
            reached = max(reached, self.steps())
            return len(self.attempts()) > attempts

        self.slurm.until(begun, "the next attempt", seconds=150)
        said = checked_halo("status", self.runs / "tiny")
        self.slurm.until(lambda: self.steps() > reached, f"a step after {reached}", seconds=120)
        return said, time.monotonic() - since


@contextmanager
def slowed(pid: int) -> Iterator[None]:
    """A process that runs a tenth of the time."""
    over = threading.Event()

    def slow() -> None:
        try:
            while not over.wait(0.05):
                os.kill(pid, signal.SIGSTOP)
                over.wait(0.45)
                os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass

    thread = threading.Thread(target=slow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
