"""The process that runs Ray on a node of a cluster of ours, for as long as whoever started it lives.

It ends only the Ray that it started: `ray stop` would end every Ray of this user on the machine.
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

PATIENCE_SECONDS = 1.0  # asked to end, Ray looks for another place for its actors for half a minute
_RETRY_SECONDS = 5.0
OBJECT_STORE_BYTES = 10**8  # tasks and results are files; Ray's own minimum is 75 MB


@dataclass(frozen=True)
class RayNode:
    """How to start Ray on a node. `head` is host:port of the cluster; `temporary` a folder of the node's own disk."""

    head: str
    is_head: bool
    temporary: str
    cpus: int | None = None
    """None: what Slurm gave this node."""
    dashboard_port: int = 0

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
            return [*command, f"--address={self.head}"]
        return [
            *command,
            "--head",
            f"--port={self.head.rpartition(':')[2]}",
            f"--temp-dir={self.temporary}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard_port}",
        ]


def own_address() -> str:
    """Where other nodes of the Slurm allocation reach this one; the loopback interface when there is none."""
    node = os.environ.get("SLURMD_NODENAME")
    return socket.gethostbyname(node) if node else "127.0.0.1"


def make_private_folder(path: Path) -> None:
    """Only this user may look in. Raises ValueError if somebody else made it first."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or path.is_symlink():
        raise ValueError(f"{path} belongs to somebody else, or others may write in it; remove it")


def main(node_json: str) -> int:
    """Run Ray until this process is asked to end or its parent is gone; 1 if the head ended before."""
    node = RayNode(**json.loads(node_json))
    temporary = Path(node.temporary)
    is_ours = node.is_head or not temporary.exists()  # on one machine, nodes may share the head's
    make_private_folder(temporary)
    asked = threading.Event()
    _set_when_asked_to_end(asked)
    while not asked.is_set():
        _run_once(node, asked)
        if node.is_head or asked.wait(_RETRY_SECONDS):
            break
    if is_ours:
        shutil.rmtree(temporary, ignore_errors=True)
    return 0 if asked.is_set() else 1


def _set_when_asked_to_end(asked: threading.Event) -> None:
    def by_signal(number: int, frame: FrameType | None) -> None:
        asked.set()

    def with_parent() -> None:
        while os.read(0, 4096):
            pass
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, by_signal)
    threading.Thread(target=with_parent, name="end-with-parent", daemon=True).start()


def _run_once(node: RayNode, asked: threading.Event) -> None:
    ray = subprocess.Popen(node.command(), stdin=subprocess.DEVNULL, start_new_session=True)
    while ray.poll() is None and not asked.wait(0.2):
        pass
    ray.terminate()
    with suppress(subprocess.TimeoutExpired):
        ray.wait(PATIENCE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(ray.pid, signal.SIGKILL)  # all but workers, who watch the raylet and end with it
    ray.wait()
