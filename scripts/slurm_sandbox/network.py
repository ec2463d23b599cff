"""The sandbox's network: one bridge joins the daemons' namespace, a namespace per node, and this machine.

This machine has a leg in it, so `sbatch` and the others work here with no more than SLURM_CONF set.
"""

from __future__ import annotations

import socket
from pathlib import Path

from .layout import Layout, one_sandbox_at_a_time
from .processes import call, succeeds

_NAMESPACES = Path("/run/netns")
# Marks our lines in this machine's host table; "ports" needs them, because every node is this machine.
_MARK = "# slurm-sandbox"


def namespaces_permitted() -> bool:
    """Whether this machine lets root make the namespaces of a node, and networks between them."""
    probe = "slurm-probe"
    allowed = succeeds(
        "unshare", "--net", "--uts", "--ipc", "--mount", "--propagation", "slave", "--pid", "--fork",
        "--mount-proc", "true",
    ) and succeeds("ip", "netns", "add", probe)  # fmt: skip
    if allowed:
        allowed = succeeds("ip", "-n", probe, "link", "add", "bridge0", "type", "bridge")
        succeeds("ip", "netns", "del", probe)
    return allowed


def create(layout: Layout) -> None:
    layout.hosts.write_text(_host_table(layout))
    if not layout.in_namespaces:
        names = " ".join(layout.nodes)
        _rewrite_machine_hosts(f"127.0.0.1 {names} {_MARK} {layout.slot}\n", layout)
        return
    head = layout.head
    call("ip", "netns", "add", head)
    call("ip", "-n", head, "link", "set", "lo", "up")
    call("ip", "-n", head, "link", "add", "bridge0", "type", "bridge")
    call("ip", "-n", head, "address", "add", f"{layout.head_address}/24", "dev", "bridge0")
    call("ip", "-n", head, "link", "set", "bridge0", "up")
    call("ip", "link", "add", head, "type", "veth", "peer", "name", "outside", "netns", head)
    call("ip", "-n", head, "link", "set", "outside", "master", "bridge0", "up")
    call("ip", "address", "add", f"{layout.outside_address}/24", "dev", head)
    call("ip", "link", "set", head, "up")
    for node in layout.nodes:
        space = layout.namespace(node)
        call("ip", "netns", "add", space)
        call("ip", "-n", space, "link", "set", "lo", "up")
        call("ip", "-n", head, "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", space)
        call("ip", "-n", head, "link", "set", node, "master", "bridge0", "up")
        call("ip", "-n", space, "address", "add", f"{layout.node_address(node)}/24", "dev", "eth0")
        call("ip", "-n", space, "link", "set", "eth0", "up")


def remove(layout: Layout) -> None:
    if not layout.in_namespaces:
        _rewrite_machine_hosts("", layout)
        return
    for space in [layout.head, *(layout.namespace(node) for node in layout.nodes)]:
        if (_NAMESPACES / space).exists():
            call("ip", "netns", "del", space)
    # The kernel removes the other end of the link a moment after its namespace.
    succeeds("ip", "link", "del", layout.head)


def set_cable(layout: Layout, node: str, plugged: bool) -> None:
    call("ip", "-n", layout.head, "link", "set", node, "up" if plugged else "down")


def in_head(layout: Layout, *command: str) -> list[str]:
    """The command line that runs `command` in the network, host name and host table of the daemons' node."""
    if not layout.in_namespaces:
        return list(command)
    enter = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
    return [
        "nsenter", f"--net={_NAMESPACES / layout.head}",
        "unshare", "--uts", "--mount", "--propagation", "slave",
        "sh", "-c", enter, "sh", layout.head, str(layout.hosts), *command,
    ]  # fmt: skip


def in_node(layout: Layout, node: str, *command: str) -> list[str]:
    """The command line that makes `command` the first process of the node: when it ends, all others of the node end."""
    return [
        "nsenter", f"--net={_NAMESPACES / layout.namespace(node)}",
        "unshare", "--uts", "--ipc", "--mount", "--propagation", "slave",
        "--pid", "--fork", "--kill-child", "--mount-proc", *command,
    ]  # fmt: skip


def _host_table(layout: Layout) -> str:
    lines = ["127.0.0.1 localhost", f"{layout.head_address} {layout.head}"]
    if layout.in_namespaces:
        lines.append(f"{layout.outside_address} {socket.gethostname()}")
    lines += [f"{layout.node_address(node)} {node}" for node in layout.nodes]
    return "\n".join(lines) + "\n"


def _rewrite_machine_hosts(line: str, layout: Layout) -> None:
    table = Path("/etc/hosts")
    with one_sandbox_at_a_time():
        old = table.read_text().splitlines(keepends=True)
        kept = [each for each in old if not each.rstrip().endswith(f"{_MARK} {layout.slot}")]
        if kept + [line] != old and (line or kept != old):
            table.write_text("".join(kept) + line)  # in place: in a container the file is a mount
