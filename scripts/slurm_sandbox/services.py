"""The daemons besides the nodes: munge, slurmctld, and MariaDB and slurmdbd for sacct."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path

from . import configuration
from .layout import SLOTS, Layout, SandboxError, one_sandbox_at_a_time, sandbox_folders
from .network import in_head
from .processes import any_named, call, running, start, stop, succeeds, wait_until

# slurmdbd uses only munge's default socket, so all sandboxes of a machine share one.
_MUNGE_SOCKET = Path("/run/munge/munge.socket.2")
_MUNGE = SLOTS / "munge"


def pid_file(layout: Layout, service: str) -> Path:
    return layout.folder / "pid" / service


def start_munge() -> None:
    """Start munge, unless one answers: that of this machine's own Slurm, or of another sandbox."""
    with one_sandbox_at_a_time():
        if not _munge_answers():
            _start_munge()


def _start_munge() -> None:
    munge = pwd.getpwnam("munge")
    for folder, mode in ((_MUNGE_SOCKET.parent, 0o755), (_MUNGE, 0o711)):
        folder.mkdir(exist_ok=True)
        folder.chmod(mode)
        os.chown(folder, munge.pw_uid, munge.pw_gid)
    key = _MUNGE / "key"
    if not key.exists():
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(1024))
        os.chown(key, munge.pw_uid, munge.pw_gid)
    for left_over in _MUNGE_SOCKET.parent.glob(f"{_MUNGE_SOCKET.name}*"):
        left_over.unlink()
    start(
        _MUNGE / "pid",
        [
            "setpriv", "--reuid", "munge", "--regid", "munge", "--clear-groups",
            "munged", "--foreground", f"--key-file={key}", f"--socket={_MUNGE_SOCKET}",
            f"--pid-file={_MUNGE}/munged.pid", f"--log-file={_MUNGE}/log", f"--seed-file={_MUNGE}/seed",
        ],
        _MUNGE / "out",
    )  # fmt: skip
    wait_until(_munge_answers, "munge", _MUNGE / "out")


def stop_munge() -> None:
    """Stop munge if no Slurm on this machine, sandbox or not, uses it any more."""
    with one_sandbox_at_a_time():
        if not list(sandbox_folders()) and not any_named("slurmctld", "slurmdbd", "slurmd"):
            stop(_MUNGE / "pid")


def _munge_answers() -> bool:
    token = subprocess.run(["munge", "--no-input"], capture_output=True, text=True, check=False)
    if token.returncode != 0:
        return False
    return subprocess.run(["unmunge"], input=token.stdout, capture_output=True, text=True).returncode == 0


def start_mariadb(layout: Layout) -> None:
    """Start slurmdbd's database; the first start creates it, with a random password."""
    if running(pid_file(layout, "mariadb")):
        return
    data, log = layout.folder / "sql", layout.log / "mariadb.out"
    new = not (data / "mysql").exists()
    if new:
        data.mkdir(mode=0o700, exist_ok=True)
        shutil.chown(data, "mysql", "mysql")
        call(
            "mariadb-install-db", "--no-defaults", "--user=mysql", f"--datadir={data}", "--skip-test-db",
            "--auth-root-authentication-method=socket", "--skip-name-resolve", "--innodb-log-file-size=8M",
        )  # fmt: skip
    daemon = shutil.which("mariadbd") or "/usr/sbin/mariadbd"
    start(
        pid_file(layout, "mariadb"),
        in_head(
            layout,
            daemon, "--no-defaults", "--user=mysql", f"--datadir={data}", f"--socket={data}/socket",
            f"--pid-file={data}/mariadbd.pid", f"--bind-address={layout.head_address}",
            f"--port={layout.port('mariadb')}", "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=8M",
            "--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900", "--skip-name-resolve",
            "--performance-schema=OFF", "--max-connections=40",
        ),
        log,
    )  # fmt: skip
    client = ["mariadb", "--no-defaults", "--user=root", f"--socket={data}/socket"]
    wait_until(lambda: succeeds(*client, "--execute=select 1"), "MariaDB", log)
    if new:
        password = secrets.token_hex(16)
        call(
            *client,
            text=f"create user 'slurm'@'%' identified by '{password}';"
            "grant all on slurm_acct_db.* to 'slurm'@'%';",
        )
        configuration.write_slurmdbd(layout, password)


def start_slurmdbd(layout: Layout) -> None:
    if running(pid_file(layout, "slurmdbd")):
        return
    log = layout.log / "slurmdbd.out"
    start(pid_file(layout, "slurmdbd"), in_head(layout, "slurmdbd", "-D"), log, layout.environment)
    wait_until(
        lambda: succeeds("sacctmgr", "-n", "show", "cluster", environment=layout.environment), "slurmdbd", log
    )
    add = ["sacctmgr", "--immediate", "add"]
    succeeds(*add, "cluster", "sandbox", environment=layout.environment)
    succeeds(*add, "account", "root", "description=root", "organization=root", environment=layout.environment)


def start_slurmctld(layout: Layout) -> None:
    """Start the controller, which restores the jobs that it had saved."""
    if running(pid_file(layout, "slurmctld")):
        return
    log = layout.log / "slurmctld.out"
    start(pid_file(layout, "slurmctld"), in_head(layout, "slurmctld", "-D"), log, layout.environment)
    wait_until(
        lambda: succeeds("scontrol", "ping", environment=layout.environment),
        "slurmctld",
        layout.log / "slurmctld.log",
    )


def revive_slurmctld(layout: Layout) -> None:
    """Restart a controller that crashed, as the service manager or the backup controller of a cluster would.

    Debian's slurmctld 22.05.8 was seen to crash on the registration of a node whose power had been cut.
    """
    if pid_file(layout, "slurmctld").exists() and not running(pid_file(layout, "slurmctld")):
        start_slurmctld(layout)
        with crashes(layout).open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} slurmctld had ended by itself and was started again\n")


def crashes(layout: Layout) -> Path:
    """One line for each restart of a crashed controller."""
    return layout.log / "slurmctld.crashes"


def stop_slurmctld(layout: Layout, how: signal.Signals = signal.SIGTERM) -> None:
    stop(pid_file(layout, "slurmctld"), how)


def stop_all(layout: Layout) -> None:
    stop_slurmctld(layout)
    stop(pid_file(layout, "slurmdbd"))
    stop(pid_file(layout, "mariadb"))


def require_running(layout: Layout) -> None:
    revive_slurmctld(layout)
    if running(pid_file(layout, "slurmctld")) is None:
        raise SandboxError(
            f"no sandbox runs in {layout.folder}; start it with python -m scripts.slurm_sandbox up"
        )
