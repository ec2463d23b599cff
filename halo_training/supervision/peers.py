"""Which ranks are alive, exchanged through the store of the process group."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from durable_files import ProcessIdentity
from sharded_tensors.ranks import from_all_ranks

SILENCE_SECONDS = 30.0
_STORE_TIMEOUT = timedelta(seconds=10)
_LOST_PEER = re.compile(
    r"gloo/|[Cc]onnection (?:was )?(?:closed|reset|refused)|[Bb]roken pipe|remote process exited|"
    r"Failed to recv|NCCL communicator was aborted"
)


class PeerLost(RuntimeError):
    """Another rank of this stage is gone, and with it its part of the model."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether torch reports by `error` that the other end of a connection is gone."""
    return isinstance(error, dist.DistNetworkError) or (
        isinstance(error, (RuntimeError, dist.DistError)) and _LOST_PEER.search(str(error)) is not None
    )


@dataclass
class Peer:
    """Another rank as seen from this one. `silent` counts seconds in which this rank ran and that one did not beat."""

    rank: int
    process: ProcessIdentity
    beats: int = -1
    silent: float = 0.0

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process.pid} on {self.process.host})"


class PeerBoard:
    """Every rank writes a counter, and reads those of the others. All ranks construct it together. Methods raise
    RuntimeError once the store, which lives in rank 0, is gone."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        # A connection of its own: that of the process group may be waiting for a rank that never comes.
        self._store = dist.PrefixStore("halo-peers", _get_default_store().clone())  # type: ignore[attr-defined]
        self._store.set_timeout(_STORE_TIMEOUT)
        self._beats = 0
        self.beat()
        processes = from_all_ranks(ProcessIdentity.current())
        self.peers = [Peer(rank, process) for rank, process in enumerate(processes) if rank != self.rank]

    def beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat-{self.rank}", str(self._beats))

    def look(self, seconds: float) -> None:
        """Read every peer's counter; for this process `seconds` have passed since the last look."""
        counters = self._store.multi_get([f"beat-{peer.rank}" for peer in self.peers])
        for peer, text in zip(self.peers, counters, strict=True):
            peer.silent = 0.0 if int(text) != peer.beats else peer.silent + seconds
            peer.beats = int(text)

    def lost(self) -> list[Peer]:
        """Peers that have ended, as far as this machine can see, or have been silent for SILENCE_SECONDS."""
        return [p for p in self.peers if p.process.has_ended() or p.silent >= SILENCE_SECONDS]

    def announce(self, verdict: str) -> str:
        """Tell all ranks why to end; returns the reason that stands, which is the first one announced."""
        standing = self._store.compare_set("verdict", "", verdict)
        return str(standing.decode())

    def verdict(self) -> str | None:
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else None
