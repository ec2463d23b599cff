"""A real Slurm for tests: scripts/slurm_sandbox, held for the length of a session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from scripts.slurm_sandbox import services
from scripts.slurm_sandbox.layout import Layout

ROOT = Path(__file__).parents[2]
HOW_TO_GET = (
    "these tests need a real Slurm, which they start themselves as root on Debian; there, or in a container of it, "
    "run: make test"
)
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class SlurmSandbox:
    """Four nodes, n1 to n4. While it is held SLURM_CONF is set, so Slurm's commands and Submitit work as they are."""

    layout: Layout

    def control(self, *arguments: str) -> None:
        """power-cut NODE..., heal NODE..., unplug NODE..., restart-slurmctld [--kill] [--after SECONDS]."""
        command = [
            sys.executable,
            "-m",
            "scripts.slurm_sandbox",
            "--folder",
            str(self.layout.folder),
            *arguments,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr

    def heal(self) -> None:
        """Every node on, plugged in and open for jobs; what earlier tests left in the queue is gone."""
        self.slurm("scancel", "--user=root")
        self.control("heal", *self.layout.nodes)
        for node in self.layout.nodes:
            if any(mark in self.node_state(node) for mark in ("DOWN", "DRAIN")):
                self.resume(node)
        self.until(lambda: all(self.node_state(node) == "IDLE" for node in self.layout.nodes), "idle nodes")

    @staticmethod
    def resume(node: str) -> None:
        """Open a node for jobs again. Slurm refuses that of one that has come back by itself."""
        command = ["scontrol", "update", f"NodeName={node}", "State=RESUME"]
        subprocess.run(command, capture_output=True, check=False, timeout=60)

    def slurm(self, *command: str) -> str:
        """Standard output of one of Slurm's commands; a controller that is away is waited for."""
        end = time.monotonic() + 30
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        while "Unable to contact slurm controller" in done.stderr and time.monotonic() < end:
            time.sleep(0.5)
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def controller_crashes(self) -> int:
        """How often slurmctld ended by itself, and was started again, since the sandbox is up."""
        log = services.crashes(self.layout)
        return len(log.read_text().splitlines()) if log.exists() else 0

    def sbatch(self, folder: Path, script: str, *options: str) -> str:
        """Submit a script from `folder`, where its output goes to <job>.out; the job's number."""
        submit = [
            "sbatch",
            "--parsable",
            "--requeue",
            "--open-mode=append",
            f"--chdir={folder}",
            "--output=%j.out",
        ]
        path = folder / "job.sh"
        path.write_text(f"#!/bin/bash\n{script}")
        return self.slurm(*submit, *options, str(path))

    def state(self, job: str) -> str:
        """As squeue says it, such as PENDING or RUNNING; for finished jobs too, which Slurm forgets after 300 s."""
        return self.slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def nodes(self, job: str) -> list[str]:
        compact = self.slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%N")
        return self.slurm("scontrol", "show", "hostnames", compact).split() if compact else []

    def node_state(self, node: str) -> str:
        """Such as IDLE, MIXED or DOWN+NOT_RESPONDING."""
        words = self.slurm("scontrol", "--oneliner", "show", "node", node).split()
        return next(word.removeprefix("State=") for word in words if word.startswith("State="))

    def until_state(self, job: str, *states: str, seconds: float = 90) -> None:
        self.until(lambda: self.state(job) in states, f"job {job} to be {' or '.join(states)}", seconds)

    def on_node(self, node: str, *command: str) -> None:
        """Run a short command that sees the node's mounts, and changes them for nobody else."""
        (pid, _) = (self.layout.folder / "pid" / f"node.{node}").read_text().split()
        done = subprocess.run(["nsenter", f"--mount=/proc/{pid}/ns/mnt", *command], check=False, timeout=60)
        assert done.returncode == 0

    @staticmethod
    def until(answer: Callable[[], Answer], what: str, seconds: float = 90) -> Answer:
        """The first answer that is true."""
        end = time.monotonic() + seconds
        while not (found := answer()):
            assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
            time.sleep(0.2)
        return found


def _refuse(sentence: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(sentence)
    pytest.skip(sentence)


def hold_slurm_sandbox(request: pytest.FixtureRequest) -> Iterator[SlurmSandbox]:
    """For a session's fixture. However the session ends, the sandbox sees its standard input end and goes down."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        _refuse(HOW_TO_GET)
    folder = Path(f"/var/lib/slurm-sandbox-tests.{os.getpid()}")
    command = [sys.executable, "-m", "scripts.slurm_sandbox", "--folder", str(folder), "up", "--hold"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as holder:  # fmt: skip
        assert holder.stdin is not None and holder.stdout is not None
        said = []
        for line in holder.stdout:
            said.append(line)
            if line == "ready\n":
                break
        else:
            pytest.fail(f"the Slurm sandbox did not start: {''.join(said)}")
        layout = Layout.load(folder)
        assert layout is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(layout.slurm_conf))
            yield SlurmSandbox(layout)
        holder.stdin.close()
        holder.wait(timeout=60)
    if request.session.testsfailed:
        print(f"Slurm's logs are in {layout.log}")
    else:
        shutil.rmtree(folder)
