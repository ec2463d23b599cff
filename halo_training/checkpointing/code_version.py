"""Identifies the code that wrote a checkpoint."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "halo_jobs",
    "halo_training",
    "halo_evaluation",
    "hypenet_megatron",
    "hypenet_kernels",
    "sharded_tensors",
    "tokenized_data",
)


@cache
def code_version() -> str:
    """The release and a hash of the source files that training uses, such as 0.1.0+1f2e3d4c."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        folder = Path(str(import_module(package).__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    try:
        release = version("hypenet-megatron")
    except PackageNotFoundError:
        release = "uninstalled"
    return f"{release}+{digest.hexdigest()[:8]}"
