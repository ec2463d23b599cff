"""Checks of a machine's software, and of the file system that a run folder is to be on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from durable_files import exclusive, write_text

DISTRIBUTION = "hypenet-megatron"
CLOCK_TOLERANCE_SECONDS = 5.0
ENOUGH_BYTES = 20 * 10**9  # weights, checkpoints and export of a conversion to HypeNet-2B
_SLURM_TIMEOUT_SECONDS = 3.0
_TITLES = {"torch": "PyTorch", "megatron-core": "Megatron-Core", "transformers": "Transformers"}


@dataclass(frozen=True)
class Check:
    """`found` says what is there, `advice` what to do about it if it is not `ok`."""

    name: str
    found: str
    ok: bool
    required: bool
    advice: str = ""


def check_software() -> Iterator[Check]:
    """Python, packages, GPUs and schedulers. The versions wanted are those that the installed package declares."""
    requirements = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    required = {one.name: one for one in requirements if one.marker is None}
    optional = {one.name: one for one in requirements if one.marker is not None}
    yield Check("Python", platform.python_version(), True, True)
    for package, title in _TITLES.items():
        yield _package(title, required.pop(package))
    others = [_package(package, requirement) for package, requirement in required.items()]
    broken = [check for check in others if not check.ok]
    yield from broken or [Check("Other packages", f"all {len(others)} are installed", True, True)]
    yield _cuda()
    yield _package("Triton", optional["triton"], "the kernels of GPU nodes")
    yield _package("Transformer Engine", Requirement("transformer-engine"), "transformer_impl: transformer_engine")
    yield _slurm()
    yield _package("Submitit", optional["submitit"], "--executor slurm")
    yield _package("Ray", optional["ray"], "--executor ray")


def _package(title: str, requirement: Requirement, needed_for: str = "") -> Check:
    """A package that everything needs, or only `needed_for`."""
    required = not needed_for
    install = f"pip install '{requirement.name}{requirement.specifier}'"
    advice = install if required else f"needed for {needed_for}: {install}"
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(title, "not installed", False, required, advice)
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(title, f"{found} does not fit", False, required, advice)
    return Check(title, found, True, required)


def _cuda() -> Check:
    try:
        import torch
    except Exception as problem:  # a broken installation raises OSError or ImportError, depending on the library
        return Check("CUDA", f"PyTorch does not load: {problem}", False, True, "install PyTorch again")
    if not torch.cuda.is_available():
        advice = "fine for the demo; on a GPU node, see whether nvidia-smi works and PyTorch is a CUDA build"
        return Check("CUDA", "no GPU found", False, False, advice)
    names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    gpus = ", ".join(f"{count} x {name}" for name, count in names.items())
    return Check("CUDA", f"{torch.version.cuda}, {gpus}", True, False)


def _slurm() -> Check:
    if shutil.which("sinfo") is None:
        return Check("Slurm", "not found", False, False, "needed for --executor slurm: run on a login node")
    try:
        version, _ = (
            subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_TIMEOUT_SECONDS, check=True)
            for command in (("sinfo", "--version"), ("scontrol", "ping"))
        )
    except (OSError, subprocess.SubprocessError) as problem:
        said = getattr(problem, "stderr", None)
        reason = ((said.strip() if isinstance(said, str) else "") or str(problem)).splitlines()[-1]
        return Check("Slurm", f"does not answer: {reason}", False, False, "see what `scontrol ping` says")
    return Check("Slurm", version.stdout.strip().removeprefix("slurm "), True, False)


def check_folder(folder: Path) -> Iterator[Check]:
    """What runs need of a file system, tried in a temporary folder. Without `folder`, its nearest parent is tried."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".halo-doctor-", dir=existing))
    except OSError as problem:
        yield Check("Folder", f"{existing}: {problem.strerror}", False, True, "choose another with --folder")
        return
    try:
        yield Check("Folder", str(existing), True, True)
        for name, attempt, required, advice in _OPERATIONS:
            try:
                attempt(scratch)
            except OSError as problem:
                yield Check(name, str(problem.strerror), False, required, advice)
            else:
                yield Check(name, "works", True, required)
        yield _clock(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    free = shutil.disk_usage(existing).free
    advice = "" if free >= ENOUGH_BYTES else "enough for the demo, not for a conversion of a larger model"
    yield Check("Free space", f"{free / 10**9:,.1f} GB", not advice, False, advice)


def _rename(scratch: Path) -> None:
    write_text(scratch / "renamed", "old")
    write_text(scratch / "renamed", "new")


def _hard_link(scratch: Path) -> None:
    (scratch / "original").touch()
    os.link(scratch / "original", scratch / "link")


def _lock(scratch: Path) -> None:
    with exclusive(scratch):
        pass


_OPERATIONS = (
    ("Rename over a file", _rename, True, "every file is published with it; use another file system"),
    ("Hard link", _hard_link, False, "works without; but a kill can leave an empty DONE.json, to be removed by hand"),
    ("Lock", _lock, True, "it keeps two commands out of one run; use another file system"),
)


def _clock(scratch: Path) -> Check:
    """The clock of the file server, which dates a new file, against this machine's."""
    (scratch / "dated").touch()
    skew = (scratch / "dated").stat().st_mtime - time.time()
    ok = abs(skew) < CLOCK_TOLERANCE_SECONDS
    advice = "" if ok else "times in logs and `halo status` will be wrong; synchronise the clocks with NTP"
    return Check("Clock of the file server", f"{skew:+.1f} s from this machine's", ok, False, advice)
