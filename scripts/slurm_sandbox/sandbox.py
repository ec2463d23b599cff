"""Starts and stops a sandbox; both may be repeated."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from . import configuration, network, nodes, packages, services
from .layout import Layout, SandboxError, claim_slot, release_slot
from .processes import call, running, succeeds, wait_until


@contextmanager
def one_command_at_a_time(folder: Path) -> Iterator[None]:
    """A lock on this sandbox; a second process waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def bring_up(folder: Path, node_count: int, mode: str | None) -> Layout:
    """Start a sandbox and wait until every node is up; one that runs is only repaired."""
    packages.require_root_on_debian()
    packages.install_missing()
    layout = Layout.load(folder)
    if layout is not None and running(services.pid_file(layout, "slurmdbd")):
        services.start_slurmctld(layout)  # if it does not run
        for node in layout.nodes:
            nodes.heal(layout, node)
    else:
        if layout is not None:
            take_down(layout)
        layout = _new(folder, node_count, mode)
        _start_new(layout)
    wait_until(lambda: _nodes_answer(layout), "one of the nodes", layout.log)
    return layout


def take_down(layout: Layout) -> None:
    """End jobs, nodes and daemons. Files stay until the next start. Does nothing if nothing runs."""
    if layout.in_namespaces:
        network_exists = Path("/run/netns", layout.head).exists()
    for node in layout.nodes:
        if not layout.in_namespaces or network_exists:
            nodes.cut_power(layout, node)
    services.stop_all(layout)
    if succeeds("mountpoint", "--quiet", str(layout.shared)):
        call("umount", "--recursive", "--lazy", str(layout.shared))
    network.remove(layout)
    release_slot(layout)
    services.stop_munge()


def _new(folder: Path, node_count: int, mode: str | None) -> Layout:
    if any(path.name not in ("lock", "sandbox.json") for path in folder.iterdir()):
        if not (folder / "sandbox.json").exists():
            raise SandboxError(f"{folder} holds other files; choose another --folder for the sandbox")
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
    if mode is None:
        mode = "namespaces" if network.namespaces_permitted() else "ports"
        if mode == "ports":
            print(
                "Namespaces are not permitted here (a container needs --privileged for them), so all nodes share "
                "this machine's network: a power cut ends a slurmd and its jobs, and no node can be unplugged."
            )
    layout = Layout(folder, claim_slot(folder), mode, node_count)
    for name in ("etc", "log", "spool", "state", "pid", "gpu", "shared"):
        (folder / name).mkdir()
    layout.save()
    return layout


def _start_new(layout: Layout) -> None:
    configuration.write(layout)
    if layout.in_namespaces:
        # Only shared mounts pass later mounts on to the nodes.
        call("mount", "--bind", str(layout.shared), str(layout.shared))
        call("mount", "--make-shared", str(layout.shared))
    network.create(layout)
    with ThreadPoolExecutor() as together:
        started = [together.submit(services.start_munge), together.submit(services.start_mariadb, layout)]
        for each in started:
            each.result()
    services.start_slurmdbd(layout)
    services.start_slurmctld(layout)
    for node in layout.nodes:
        nodes.switch_on(layout, node)


def _nodes_answer(layout: Layout) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %t"],
        env=layout.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    states = dict(line.split() for line in done.stdout.splitlines())
    return len(states) == layout.node_count and set(states.values()) <= {"idle", "mix", "alloc"}
