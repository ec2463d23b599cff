"""How the ranks of a world find each other: rank 0 listens at a free port and publishes it in a file.

The environment names the rank (RANK), the size of the world (WORLD_SIZE), the host name of rank 0 (MASTER_ADDR) and a
folder that all ranks see and that no earlier world has used (HALO_RENDEZVOUS). The port is bound before it is
published, so it cannot be taken in between.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from durable_files import read_json, write_json

RENDEZVOUS_SECONDS = 600.0
LOOPBACK = "127.0.0.1"
_POLL_SECONDS = 0.05


class RendezvousTimeout(RuntimeError):
    """Ranks did not arrive in time; the message names them."""


def rendezvous(timeout: float) -> tuple[dist.Store, int, int]:
    """The store that all ranks share, once all have arrived; this rank; the number of ranks.

    RendezvousTimeout if they do not arrive within `timeout` seconds.
    """
    rank, size, host = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["MASTER_ADDR"]
    if host == LOOPBACK and sys.platform == "linux":
        for backend in ("GLOO", "NCCL"):  # their own connections stay on this machine too
            os.environ.setdefault(f"{backend}_SOCKET_IFNAME", "lo")
    return meet(rank, size, host, Path(os.environ["HALO_RENDEZVOUS"]), timeout), rank, size


def meet(rank: int, size: int, host: str, folder: Path, timeout: float) -> dist.Store:
    """`rendezvous`, with what the environment says as arguments."""
    deadline, file = time.monotonic() + timeout, folder / "rendezvous.json"
    store = _listen(host, file, size) if rank == 0 else _connect(file, rank, size, deadline, timeout)
    store.set(f"arrived-{rank}", "")
    everyone = [f"arrived-{other}" for other in range(size)]
    try:
        store.wait(everyone, timedelta(seconds=max(1.0, deadline - time.monotonic())))
    except dist.DistError as problem:
        missing = [other for other, key in enumerate(everyone) if not store.check([key])]
        raise _timeout(missing, size, timeout) from problem
    return store


def _timeout(missing: list[int], size: int, timeout: float) -> RendezvousTimeout:
    ranks = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
    return RendezvousTimeout(f"{ranks} of {size} did not arrive within {timeout:g} s")


def _listen(host: str, file: Path, size: int) -> dist.Store:
    if host == LOOPBACK:
        listener = socket.create_server((LOOPBACK, 0))
    elif socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("", 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    write_json(file, {"host": host, "port": port})
    return store


def _connect(file: Path, rank: int, size: int, deadline: float, timeout: float) -> dist.Store:
    while not file.exists():
        if time.monotonic() >= deadline:
            raise _timeout([0], size, timeout)
        time.sleep(_POLL_SECONDS)
    address = read_json(file)
    remaining = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    try:
        return dist.TCPStore(address["host"], address["port"], size, is_master=False, timeout=remaining)
    except dist.DistError as problem:
        raise RendezvousTimeout(
            f"rank {rank} could not reach rank 0 at {address['host']}:{address['port']} "
            f"({str(problem).splitlines()[0]})"
        ) from problem
