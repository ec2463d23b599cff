"""A Ray cluster of our own: on all nodes of the Slurm allocation that this process is in, or on this machine alone.

Access takes a token, made anew for each cluster, in a file that only this user may read. Without Slurm everything is
bound to the loopback interface. In an allocation nodes find each other by the addresses of their Slurm names, and the
dashboard is bound to the head's loopback interface.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from halo_cluster.fan_out.crews import end_processes
from halo_cluster.fan_out.ray_node import RayNode, make_private_folder, own_address

# A step of our own within a step of Slurm's would take these for wishes of the user's.
_OF_ANOTHER_STEP = (
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_TASKS_PER_NODE",
    "SLURM_STEP",
    "SLURM_CPU_BIND",
    "SLURM_MEM_",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def without_usage_statistics(environment: Mapping[str, str]) -> dict[str, str]:
    return {**environment, "RAY_USAGE_STATS_ENABLED": "0"}


def _node_folder() -> Path:
    """On the node's own disk, and short, for Ray keeps sockets there: Ray's own choice unless somebody else has it."""
    ray_default, fallback = Path("/tmp/ray"), Path("/tmp")
    try:
        ray_default.mkdir(exist_ok=True)
    except OSError:
        return fallback
    return ray_default if os.access(ray_default, os.W_OK) else fallback


class RayCluster:
    """Its processes are children of this one, and end with it."""

    def __init__(self, logs: Path, name: str, cpus: int) -> None:
        """Start it; `logs`/`name`.* get its token and what it prints. Without Slurm it offers `cpus`, whatever the
        machine has: the number of workers is the limit."""
        in_slurm = "SLURM_JOB_ID" in os.environ
        self.address = f"{own_address()}:{free_port()}"
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        self.token = logs / f"{name}.token"
        with open(os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
            handle.write(secrets.token_hex(32))
        self.environment = without_usage_statistics(os.environ) | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_ADDRESS": self.address,
        }
        if not in_slurm:
            self.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's word for "loopback only"
        temporary = _node_folder() / f"halo-{secrets.token_hex(6)}"
        make_private_folder(temporary)
        head = RayNode(self.address, True, str(temporary), None if in_slurm else cpus)
        port = int(self.dashboard.rpartition(":")[2])
        self._processes = [self._start([], replace(head, dashboard_port=port), logs / f"{name}.head.log")]
        others = int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) - 1
        if others:
            steps = ["--no-kill", "--overlap", "--relative=1", f"--nodes={others}", f"--ntasks={others}"]
            srun = ["srun", *steps, "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
            node = replace(head, is_head=False)
            self._processes.append(self._start(srun, node, logs / f"{name}.nodes.log"))

    def _start(self, before: list[str], node: RayNode, log: Path) -> subprocess.Popen[bytes]:
        environment = {
            key: value for key, value in self.environment.items() if not key.startswith(_OF_ANOTHER_STEP)
        }
        module = [sys.executable, "-m", "halo_cluster.fan_out", "ray-node", json.dumps(asdict(node))]
        with open(log, "ab") as handle:
            return subprocess.Popen(
                [*before, *module],
                env=environment if before else self.environment,
                stdin=subprocess.PIPE,
                stdout=handle,
                stderr=handle,
                start_new_session=True,
            )

    @property
    def has_head(self) -> bool:
        """Without it nothing goes on; without one of the others its actors are placed elsewhere."""
        return self._processes[0].poll() is None

    def end(self) -> None:
        end_processes(self._processes[::-1])
