"""Faults at random on the Slurm sandbox: what kills processes, jobs, nodes and the controller while a run goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from halo_cluster.jobs import SchedulerUnreachable
from halo_cluster.slurm.queue import live_jobs
from scripts.slurm_sandbox.nodes import is_on, processes_of_jobs
from scripts.slurm_sandbox.processes import children
from tests.support.cluster_sandbox import SlurmSandbox

POWER_OFF_SECONDS = 30.0
DOWN_SECONDS = 10.0


@dataclass
class RandomFaults:
    """One fault after another, each of a kind drawn by `rng` among those for which there is a victim.

    `driver` is the process group leader whose child is the command that looks after the run.
    """

    slurm: SlurmSandbox
    rng: random.Random
    driver: subprocess.Popen[bytes]
    log: Path
    counts: Counter[str] = field(default_factory=Counter)
    _mending: list[threading.Timer] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)
    _crashes_before: int = 0

    def __post_init__(self) -> None:
        self._crashes_before = self.slurm.controller_crashes()

    def strike(self) -> None:
        """One fault, now; the controller's restart needs no victim."""
        kinds: list[Callable[[], str]] = [
            self.rank_killed,
            self.rank_stopped,
            self.stage_process_killed,
            self.driver_killed,
            self.job_requeued,
            self.power_cut,
            self.node_down,
            self.controller_restarted,
        ]
        for kind in self.rng.sample(kinds, len(kinds)):
            if victim := kind():
                name = kind.__name__.replace("_", " ")
                self.counts[name] += 1
                self._say(f"{name}: {victim}")
                return

    def mend(self) -> None:
        """Wait until every node that is off comes back; count the crashes that Slurm added of its own."""
        for timer in self._mending:
            timer.join()
        if crashes := self.slurm.controller_crashes() - self._crashes_before:
            self.counts["controller crashed"] = crashes

    def rank_killed(self) -> str:
        return self._signal(signal.SIGKILL, "halo_jobs.worker")

    def rank_stopped(self) -> str:
        """Hangs, as far as others can see."""
        return self._signal(signal.SIGSTOP, "halo_jobs.worker")

    def stage_process_killed(self) -> str:
        """The process of a node, which is Submitit's until it becomes the stage's."""
        return self._signal(signal.SIGKILL, self.rng.choice(["submitit.core._submit", "halo_jobs.stage_job"]))

    def driver_killed(self) -> str:
        for pid in children(self.driver.pid):
            if b"halo_jobs.cli" in _command(pid):
                os.kill(pid, signal.SIGKILL)
                return f"process {pid}"
        return ""

    def job_requeued(self) -> str:
        try:
            running = [job.job for jobs in live_jobs().values() for job in jobs if job.state == "running"]
        except SchedulerUnreachable:
            return ""
        if not running:
            return ""
        job = self.rng.choice(running)
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, check=False, timeout=60)
        return f"job {job}" if done.returncode == 0 else ""  # it may have ended by itself

    def power_cut(self) -> str:
        node = self._node_at_work()
        if not is_on(self.slurm.layout, node):
            return ""
        self.slurm.control("power-cut", node)
        self._later(POWER_OFF_SECONDS, lambda: self.slurm.control("heal", node))
        return node

    def node_down(self) -> str:
        node = self._node_at_work()
        if "DOWN" in self.slurm.node_state(node):
            return ""
        self.slurm.slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=weather")
        self._later(DOWN_SECONDS, lambda: self.slurm.resume(node))
        return node

    def controller_restarted(self) -> str:
        how = self.rng.choice([[], ["--kill"]])
        self.slurm.control("restart-slurmctld", *how, "--after", str(self.rng.randrange(6)))
        return "kill -9" if how else "orderly"

    def _say(self, what: str) -> None:
        with self.log.open("a") as handle:
            handle.write(f"{time.monotonic() - self._began:6.1f} s  {what}\n")

    def _node_at_work(self) -> str:
        """Any, while none has something to do."""
        layout = self.slurm.layout
        return self.rng.choice([n for n in layout.nodes if processes_of_jobs(layout, n)] or layout.nodes)

    def _signal(self, number: signal.Signals, program: str) -> str:
        layout = self.slurm.layout
        found = [
            (node, pid)
            for node in layout.nodes
            for pid in processes_of_jobs(layout, node)
            if program.encode() in _command(pid)
        ]
        if not found:
            return ""
        node, pid = self.rng.choice(found)
        with suppress(ProcessLookupError):
            what = _command(pid).decode().replace("\0", " ")
            os.kill(pid, number)
            return f"process {pid} on {node}: {' '.join(what.split()[1:])}"
        return ""

    def _later(self, seconds: float, action: Callable[[], object]) -> None:
        timer = threading.Timer(seconds, action)
        timer.start()
        self._mending.append(timer)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
