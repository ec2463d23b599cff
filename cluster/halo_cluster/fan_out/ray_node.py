"""The process that runs Ray on a node of a cluster of ours, as long as the process that started it lives.

It ends only the Ray that it started: `ray stop` would end every Ray of this user on the machine. The head lets Ray
choose a free port and then publishes its address, so no port can be taken in between.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from durable_files import publish_text_once
from halo_cluster.children import on_parent_end
from halo_cluster.signals import on_signals

_GRACE_SECONDS = 1.0  # after SIGTERM, Ray looks for another place for its actors for half a minute
_RETRY_SECONDS = 5.0
_CONNECT_SECONDS = 120.0
_POLL_SECONDS = 0.2
OBJECT_STORE_BYTES = 10**8  # tasks and results are files; Ray's own minimum is 75 MB


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
            f"--object-store-memory={OBJECT_STORE_BYTES}",
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
    ray = subprocess.Popen(node.command(), stdin=subprocess.DEVNULL, start_new_session=True)
    while ray.poll() is None and not asked.wait(_POLL_SECONDS):
        if node.is_head:
            _publish_address(node)
    ray.terminate()
    with suppress(subprocess.TimeoutExpired):
        ray.wait(_GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(ray.pid, signal.SIGKILL)  # all but Ray's workers, which end with the raylet
    ray.wait()


def _publish_address(node: RayNode) -> None:
    address_file, by_ray = Path(node.address_file), Path(node.temporary) / "ray_current_cluster"
    if not address_file.exists() and by_ray.exists() and (address := by_ray.read_text()):
        publish_text_once(address_file, address)
