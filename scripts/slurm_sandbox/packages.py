"""The Debian packages of a sandbox."""

from __future__ import annotations

import os
import shutil
import subprocess

from .layout import SandboxError, one_sandbox_at_a_time

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "slurmdbd", "mariadb-server", "munge", "iproute2"]


def require_root_on_debian() -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-query") is None:
        raise SandboxError(
            "the sandbox is made of Debian's Slurm packages and there is no apt-get here; "
            "use a Debian machine, virtual machine or container"
        )
    if os.geteuid() != 0:
        raise SandboxError("the sandbox starts daemons and makes networks; run the same command as root")


def install_missing() -> None:
    with one_sandbox_at_a_time():
        _install_missing()


def _install_missing() -> None:
    missing = [package for package in PACKAGES if not _installed(package)]
    if not missing:
        return
    print(f"Installing Debian's {', '.join(missing)}; the first time this fetches about 100 MB.", flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
    ):
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            complaint = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise SandboxError(f"'{' '.join(command)}' failed; fix that and run this again: {complaint}")


def _installed(package: str) -> bool:
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", package]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout == "installed"
