"""A Ray cluster of our own: on all nodes of the Slurm allocation that this process is in, or on this machine alone.

Access takes a token, made anew for each cluster, in a file that only this user may read. Without Slurm everything is
bound to the loopback interface. In an allocation nodes find each other by the addresses of their Slurm names, and the
dashboard is bound to the head's loopback interface. Ray chooses free ports; the head publishes its address in a file
that the other processes wait for (ray_node.py).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from halo_cluster.children import Child, end_children, start_child
from halo_cluster.fan_out.ray_node import RayNode, make_private_folder, wait_for_address
from halo_cluster.fan_out.worker_pools import GRACE_SECONDS, fan_out_command

# A step of ours inside a step of Slurm's would take these for its own options.
_OF_ANOTHER_STEP = (
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_TASKS_PER_NODE",
    "SLURM_STEP",
    "SLURM_CPU_BIND",
    "SLURM_MEM_",
)


def without_usage_statistics(environment: Mapping[str, str]) -> dict[str, str]:
    return {**environment, "RAY_USAGE_STATS_ENABLED": "0"}


def _node_folder() -> Path:
    """A folder on the node's own disk with a short path, for Ray keeps sockets there: Ray's default if it is ours."""
    ray_default, fallback = Path("/tmp/ray"), Path("/tmp")
    try:
        ray_default.mkdir(exist_ok=True)
    except OSError:
        return fallback
    return ray_default if os.access(ray_default, os.W_OK) else fallback


class RayCluster:
    """Its processes are children of this one, and end with it."""

    def __init__(self, logs: Path, name: str, cpus: int) -> None:
        """Start it; `logs`/`name`.* receive its token, its address and its logs. Without Slurm it offers `cpus`,
        whatever the machine has, because the number of workers is the limit."""
        in_slurm = "SLURM_JOB_ID" in os.environ
        self.address_file = logs / f"{name}.address"
        self.token = logs / f"{name}.token"
        with open(os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
            handle.write(secrets.token_hex(32))
        self.environment = without_usage_statistics(os.environ) | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
        }
        self.environment.pop("RAY_ADDRESS", None)  # of a cluster of the user's
        if not in_slurm:
            self.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # how Ray spells "loopback only"
        temporary = _node_folder() / f"halo-{secrets.token_hex(6)}"
        make_private_folder(temporary)
        head = RayNode(str(self.address_file), True, str(temporary), None if in_slurm else cpus)
        self._processes = [self._start([], head, logs / f"{name}.head.log")]
        others = int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) - 1
        if others:
            steps = ["--no-kill", "--overlap", "--relative=1", f"--nodes={others}", f"--ntasks={others}"]
            srun = ["srun", *steps, "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
            node = replace(head, is_head=False)
            self._processes.append(self._start(srun, node, logs / f"{name}.nodes.log"))

    def _start(self, launcher: list[str], node: RayNode, log: Path) -> Child:
        environment = self.environment
        if launcher:
            environment = {
                key: value for key, value in environment.items() if not key.startswith(_OF_ANOTHER_STEP)
            }
        command = fan_out_command("ray-node", json.dumps(asdict(node)))
        return start_child([*launcher, *command], log=log, environment=environment)

    @property
    def address(self) -> str:
        """host:port, once the head has published it."""
        return wait_for_address(self.address_file)

    @property
    def has_head(self) -> bool:
        """Without its head a cluster is lost; the actors of any other node are placed elsewhere."""
        return self._processes[0].poll() is None

    def end(self) -> None:
        end_children(self._processes[::-1], GRACE_SECONDS)
