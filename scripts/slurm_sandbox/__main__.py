"""python -m scripts.slurm_sandbox: a real Slurm on this machine, for trying recipes and injecting faults."""

from __future__ import annotations

import argparse
import select
import signal
import sys
import time
from pathlib import Path

from . import nodes, services
from .layout import Layout, SandboxError
from .sandbox import bring_up, one_command_at_a_time, take_down

# Not below /tmp: root should not write where other users can place a link.
DEFAULT_FOLDER = Path("/var/lib/slurm-sandbox")
EXAMPLES = """\
As root on Debian:
  python -m scripts.slurm_sandbox up             a controller, accounting and nodes n1 to n4; 10 seconds
  export SLURM_CONF=/var/lib/slurm-sandbox/etc/slurm.conf
  sinfo                                          sbatch, squeue, sacct, scontrol and srun work from here on
  python -m scripts.slurm_sandbox power-cut n2   its jobs die; Slurm notices after 10 s and requeues them
  python -m scripts.slurm_sandbox heal n2        and it is back
  python -m scripts.slurm_sandbox down           everything ends; logs stay in /var/lib/slurm-sandbox/log

Partitions: batch (the default), grace (a preempted job has 20 s to save), urgent (takes nodes from both).
Every node claims 4 CPUs and 2 GPUs, whatever the machine has; the GPUs are /dev/null.
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.slurm_sandbox",
        description="A real Slurm of several nodes on this one machine, to try recipes on and to break on purpose.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=DEFAULT_FOLDER,
        help=f"where the sandbox keeps its files ({DEFAULT_FOLDER})",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start it, or repair the one that runs: every node is healed")
    up.add_argument(
        "--nodes", type=int, default=4, choices=range(1, 17), metavar="1..16", help="how many (4)"
    )
    up.add_argument(
        "--mode", choices=("namespaces", "ports"),
        help="how nodes are kept apart; without it namespaces where the machine permits them, ports elsewhere",
    )  # fmt: skip
    up.add_argument(
        "--hold", action="store_true",
        help="say 'ready', wait until standard input ends, and take the sandbox down; for tests, which may be killed",
    )  # fmt: skip
    commands.add_parser("down", help="stop all of it")
    for name, explanation in {
        "power-cut": "switch nodes off, as a lost machine would be",
        "unplug": "take nodes off the network; what runs there runs on",
        "heal": "switch nodes on and plug them in",
    }.items():
        commands.add_parser(name, help=explanation).add_argument("nodes", nargs="+", metavar="NODE")
    restart = commands.add_parser(
        "restart-slurmctld", help="end the controller and start it again; jobs go on"
    )
    restart.add_argument(
        "--after", type=float, default=0, metavar="SECONDS", help="how long it stays away (0)"
    )
    restart.add_argument("--kill", action="store_true", help="kill -9 in place of an orderly end")
    return parser.parse_args()


def _existing(folder: Path) -> Layout:
    layout = Layout.load(folder)
    if layout is None:
        raise SandboxError(
            f"no sandbox was started in {folder}; python -m scripts.slurm_sandbox up starts one"
        )
    return layout


def _up(arguments: argparse.Namespace, folder: Path) -> None:
    began = time.monotonic()
    if arguments.hold:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C of a terminal is for the process that holds the sandbox
    try:
        with one_command_at_a_time(folder):
            layout = bring_up(folder, arguments.nodes, arguments.mode)
        names = f"{layout.nodes[0]} to {layout.nodes[-1]}"
        print(f"Slurm runs with nodes {names}, after {time.monotonic() - began:.1f} s. To use it:")
        print(f"export SLURM_CONF={layout.slurm_conf}", flush=True)
        if arguments.hold:
            print("ready", flush=True)
            _hold(layout, folder)
    finally:
        if arguments.hold:
            with one_command_at_a_time(folder):
                layout_now = Layout.load(folder)
                if layout_now is not None:
                    take_down(layout_now)


def _hold(layout: Layout, folder: Path) -> None:
    """Wait until standard input ends, and restart the controller if it crashes meanwhile."""
    while not select.select([sys.stdin], [], [], 1.0)[0] or sys.stdin.readline():
        with one_command_at_a_time(folder):
            services.revive_slurmctld(layout)


def _act(arguments: argparse.Namespace, folder: Path) -> None:
    if arguments.command == "up":
        _up(arguments, folder)
        return
    layout = _existing(folder)
    with one_command_at_a_time(folder):
        if arguments.command == "down":
            take_down(layout)
            return
        services.require_running(layout)
        if arguments.command == "restart-slurmctld":
            services.stop_slurmctld(layout, signal.SIGKILL if arguments.kill else signal.SIGTERM)
            time.sleep(arguments.after)
            services.start_slurmctld(layout)
            return
        nodes.require_known(layout, arguments.nodes)
        action = {"power-cut": nodes.cut_power, "unplug": nodes.unplug, "heal": nodes.heal}[arguments.command]
        for node in arguments.nodes:
            action(layout, node)


def main() -> int:
    arguments = _arguments()
    try:
        _act(arguments, arguments.folder.absolute())
    except SandboxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
