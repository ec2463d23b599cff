"""A sandbox's files, nodes, addresses and ports."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

# One link per sandbox of this machine, to its folder. A reboot removes them, like the sandboxes.
SLOTS = Path("/run/slurm-sandbox")
SLOT_COUNT = 16


class SandboxError(Exception):
    """An error that the user can fix; the message is one sentence that says how."""


@dataclass(frozen=True)
class Layout:
    """A sandbox's names and places.

    `mode` is "namespaces" (every node with its own network, host name, processes and mounts) or "ports" (every node
    a slurmd of its own port, for containers that forbid namespaces). `slot` tells sandboxes of one machine apart.
    """

    folder: Path
    slot: int
    mode: str
    node_count: int

    @property
    def nodes(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.node_count + 1)]

    @property
    def in_namespaces(self) -> bool:
        return self.mode == "namespaces"

    # Addresses are of the range that RFC 2544 reserves for network tests, so nobody else uses them.
    @property
    def network(self) -> str:
        return f"198.18.{100 + self.slot}"

    @property
    def head_address(self) -> str:
        return f"{self.network}.1" if self.in_namespaces else "127.0.0.1"

    @property
    def outside_address(self) -> str:
        """This machine's own address in the sandbox's network."""
        return f"{self.network}.2"

    def node_address(self, node: str) -> str:
        return f"{self.network}.{10 + int(node[1:])}" if self.in_namespaces else "127.0.0.1"

    @property
    def head(self) -> str:
        """Host name of the daemons' node, also the name of its network namespace and of the link to it."""
        return f"slurm{self.slot}-head" if self.in_namespaces else socket.gethostname()

    def namespace(self, node: str) -> str:
        return f"slurm{self.slot}-{node}"

    def port(self, service: str) -> int:
        offsets = {"slurmctld": 0, "slurmdbd": 1, "mariadb": 2}
        return 16800 + 100 * self.slot + offsets[service]

    def node_port(self, node: str) -> int:
        return 16810 + 100 * self.slot + int(node[1:])

    @property
    def slurm_conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    @property
    def hosts(self) -> Path:
        return self.folder / "etc" / "hosts"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def shared(self) -> Path:
        """Every node sees what is mounted below this folder while the sandbox runs."""
        return self.folder / "shared"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of Slurm's commands and daemons."""
        return {**os.environ, "SLURM_CONF": str(self.slurm_conf)}

    def save(self) -> None:
        content = {**asdict(self), "folder": str(self.folder)}
        (self.folder / "sandbox.json").write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Layout | None:
        """The sandbox that was started in `folder`; None if there never was one."""
        try:
            content = json.loads((folder / "sandbox.json").read_text())
        except FileNotFoundError:
            return None
        return cls(**{**content, "folder": folder})


def claim_slot(folder: Path) -> int:
    """The lowest number that no other sandbox has; only one of two that start at once can make the link."""
    SLOTS.mkdir(mode=0o755, exist_ok=True)
    for slot in range(SLOT_COUNT):
        try:
            (SLOTS / str(slot)).symlink_to(folder)
        except FileExistsError:
            continue
        return slot
    raise SandboxError(
        f"{SLOT_COUNT} sandboxes run on this machine already ({SLOTS}); take one down with "
        "python -m scripts.slurm_sandbox down --folder FOLDER"
    )


@contextmanager
def one_sandbox_at_a_time() -> Iterator[None]:
    """A lock for what all sandboxes of a machine share: packages, munge, the host table."""
    SLOTS.mkdir(mode=0o755, exist_ok=True)
    with (SLOTS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def release_slot(layout: Layout) -> None:
    link = SLOTS / str(layout.slot)
    if link.is_symlink() and link.readlink() == layout.folder:
        link.unlink()


def sandbox_folders() -> Iterator[Path]:
    """Folders of every sandbox of this machine."""
    if SLOTS.is_dir():
        yield from (link.readlink() for link in SLOTS.iterdir() if link.is_symlink())
