"""A Ray cluster of our own: on all nodes of the Slurm allocation that this process is in, or on this machine alone.

Access takes a token, made anew for each cluster, in a file that only this user may read. Without Slurm everything is
bound to the loopback interface. In an allocation nodes find each other by the addresses of their Slurm names, and the
dashboard is bound to the head's loopback interface. The head lets Ray choose free ports, so none can be taken in
between, and then publishes its address in a file that the other processes wait for.

On each node a process of ours (`main`) runs Ray as long as the process that started it lives. It ends only the Ray that
it started: `ray stop` would end every Ray of this user on the machine.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from durable_files import publish_text_once
from halo_cluster.children import Child, end_children, on_parent_end, start_child
from halo_cluster.fan_out.worker_pools import GRACE_SECONDS, fan_out_command
from halo_cluster.signals import on_signals

_RAY_GRACE_SECONDS = 1.0  # after SIGTERM, Ray looks for another place for its actors for half a minute
_RETRY_SECONDS = 5.0
_CONNECT_SECONDS = 120.0
_POLL_SECONDS = 0.2
_OBJECT_STORE_BYTES = 10**8  # tasks and results are files; Ray's own minimum is 75 MB
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
    ray_default = Path("/tmp/ray")
    with suppress(OSError):
        ray_default.mkdir(exist_ok=True)
    return ray_default if os.access(ray_default, os.W_OK) else Path("/tmp")


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
    def has_head(self) -> bool:
        """Without its head a cluster is lost; the actors of any other node are placed elsewhere."""
        return self._processes[0].poll() is None

    def end(self) -> None:
        end_children(self._processes[::-1], GRACE_SECONDS)


@dataclass(frozen=True)
class RayNode:
    """How to start Ray on a node. `temporary` is a folder of the node's own disk."""

    address_file: str
    """Where the head publishes host:port of the cluster."""
    is_head: bool
    temporary: str
    cpus: int | None = None
    """None: what Slurm gave this node."""

    def command(self) -> list[str]:
        """`ray start` that stays in the foreground, bound to one explicit address."""
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            f"--node-ip-address={own_address()}",
            f"--num-cpus={self.cpus or os.environ['SLURM_CPUS_ON_NODE']}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            "--dashboard-agent-listen-port=0",
            "--dashboard-agent-grpc-port=0",
            "--runtime-env-agent-port=0",
            "--metrics-export-port=0",
            "--disable-usage-stats",
            "--block",
        ]
        if not self.is_head:
            return [*command, f"--address={wait_for_address(Path(self.address_file))}"]
        head = ["--head", "--port=0", "--dashboard-host=127.0.0.1", "--dashboard-port=0"]
        return [*command, *head, f"--temp-dir={self.temporary}"]


def own_address() -> str:
    """Where other nodes of the Slurm allocation reach this one; the loopback interface when there is none."""
    node = os.environ.get("SLURMD_NODENAME")
    return socket.gethostbyname(node) if node else "127.0.0.1"


def wait_for_address(file: Path) -> str:
    """host:port of the head, once it has published that in `file`; RuntimeError after _CONNECT_SECONDS."""
    deadline = time.monotonic() + _CONNECT_SECONDS
    while not file.exists():
        if time.monotonic() >= deadline:
            raise RuntimeError(
                f"the head of Ray did not publish its address in {file} within {_CONNECT_SECONDS:g} s; "
                f"see {file.with_suffix('.head.log')}"
            )
        time.sleep(_POLL_SECONDS)
    return file.read_text().strip()


def make_private_folder(path: Path) -> None:
    """Make a folder that only this user can read. ValueError if another user made it first."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or path.is_symlink():
        raise ValueError(f"{path} belongs to another user, or others may write in it; remove it")


def main(node_json: str) -> int:
    """Run Ray until this process is asked to end or its parent is gone; 1 if the head ended before."""
    node = RayNode(**json.loads(node_json))
    temporary = Path(node.temporary)
    owns_temporary = node.is_head or not temporary.exists()  # on one machine, nodes may share the head's
    make_private_folder(temporary)
    asked = threading.Event()
    on_signals((signal.SIGTERM, signal.SIGINT), lambda number: asked.set())
    on_parent_end(asked.set)
    while not asked.is_set():
        _run_once(node, asked)
        if node.is_head or asked.wait(_RETRY_SECONDS):
            break
    if owns_temporary:
        shutil.rmtree(temporary, ignore_errors=True)
    return 0 if asked.is_set() else 1


def _run_once(node: RayNode, asked: threading.Event) -> None:
    ray = start_child(node.command())
    address_file, by_ray = Path(node.address_file), Path(node.temporary) / "ray_current_cluster"
    while ray.poll() is None and not asked.wait(_POLL_SECONDS):
        if node.is_head and not address_file.exists() and by_ray.exists() and (address := by_ray.read_text()):
            publish_text_once(address_file, address)
    end_children([ray], _RAY_GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(ray.pid, signal.SIGKILL)  # all but Ray's workers, which end with the raylet
