"""Nodes: power on, power cut, network cable, repair."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from . import network
from .layout import Layout, SandboxError
from .processes import children, kill_tree, running, start, stop

_INIT = Path(__file__).parent / "node_init.sh"


def _pid_file(layout: Layout, node: str) -> Path:
    return layout.folder / "pid" / f"node.{node}"


def is_on(layout: Layout, node: str) -> bool:
    return running(_pid_file(layout, node)) is not None


def require_known(layout: Layout, nodes: list[str]) -> None:
    for node in nodes:
        if node not in layout.nodes:
            raise SandboxError(f"there is no node {node}; the sandbox has {', '.join(layout.nodes)}")


def switch_on(layout: Layout, node: str) -> None:
    if is_on(layout, node):
        return
    (layout.folder / "spool" / node).mkdir(parents=True, exist_ok=True)
    if layout.in_namespaces:
        command = network.in_node(layout, node, str(_INIT), node, str(layout.hosts))
    else:
        command = ["slurmd", "-D", "-N", node]
    start(_pid_file(layout, node), command, layout.log / f"slurmd.{node}.out", layout.environment)


def cut_power(layout: Layout, node: str) -> None:
    """As when a machine loses power: it falls silent, and all its processes are gone."""
    if layout.in_namespaces:
        network.set_cable(layout, node, plugged=False)  # so that not even the end of its connections is sent
    stop(_pid_file(layout, node), signal.SIGKILL)
    if not layout.in_namespaces:
        for pid in list(_step_daemons(layout, node)):
            kill_tree(pid)


def unplug(layout: Layout, node: str) -> None:
    """Processes on the node continue, but the node is unreachable."""
    if not layout.in_namespaces:
        raise SandboxError(
            "nodes can be unplugged only where network namespaces are permitted; use power-cut here"
        )
    network.set_cable(layout, node, plugged=False)


def heal(layout: Layout, node: str) -> None:
    """Plug the cable in and switch the power on."""
    if layout.in_namespaces:
        network.set_cable(layout, node, plugged=True)
    switch_on(layout, node)


def _step_daemons(layout: Layout, node: str) -> Iterator[int]:
    """If nodes share one process table: the slurmstepd processes whose tasks belong to this node."""
    marks = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={layout.slurm_conf}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if (folder / "comm").read_text() != "slurmstepd\n":
                continue
            for task in children(int(folder.name)):
                if marks <= set(Path(f"/proc/{task}/environ").read_bytes().split(b"\0")):
                    yield int(folder.name)
                    break


def processes_of_jobs(layout: Layout, node: str) -> list[int]:
    """The pids on this machine of all processes of jobs on the node, in ascending order."""
    marks = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={layout.slurm_conf}".encode()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if marks <= set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return sorted(found)
