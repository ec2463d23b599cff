"""Worlds of ranks that a test spawns itself."""

from __future__ import annotations

import os
from pathlib import Path


def describe_world(rank: int, ranks: int, folder: Path) -> None:
    """Name this rank in the environment, as `run_ranks` does. Rank 0 publishes its address in `folder`, so every world
    needs another one."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "HALO_RENDEZVOUS": str(folder),
    }
