"""How ranks find each other; here they are threads, since the protocol needs no process of its own."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from durable_files import read_json
from hypenet_megatron.runtime import RendezvousTimeout
from hypenet_megatron.runtime.rendezvous import LOOPBACK, meet


def meet_all(folder: Path, size: int, host: str = LOOPBACK) -> list:
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(size) as ranks:
        # The last rank first: it has to wait for the address.
        return list(ranks.map(lambda rank: meet(rank, size, host, folder, 20.0), reversed(range(size))))[::-1]


def test_ranks_share_a_store_once_all_have_arrived(tmp_path):
    stores = meet_all(tmp_path, 3)
    stores[2].set("greeting", "hello")
    assert [store.get("greeting") for store in stores] == [b"hello"] * 3


def test_worlds_that_begin_at_once_do_not_share_a_port(tmp_path):
    with ThreadPoolExecutor(4) as worlds:
        started = list(worlds.map(lambda name: meet_all(tmp_path / name, 2), "abcd"))
    for number, stores in enumerate(started):
        stores[0].set("world", str(number))
    assert [stores[1].get("world") for stores in started] == [b"0", b"1", b"2", b"3"]
    assert len({read_json(tmp_path / name / "rendezvous.json")["port"] for name in "abcd"}) == 4


@pytest.mark.parametrize(
    ("host", "interfaces"), [(LOOPBACK, {LOOPBACK}), (socket.gethostname(), {"::", "0.0.0.0"})]
)
def test_on_one_host_rank_0_listens_on_the_loopback_interface_only(tmp_path, host, interfaces):
    stores = meet_all(tmp_path, 2, host)
    port = read_json(tmp_path / "rendezvous.json")["port"]
    listening = {
        link.laddr.ip
        for link in psutil.Process().net_connections("tcp")
        if link.status == psutil.CONN_LISTEN and link.laddr.port == port
    }
    assert listening and listening <= interfaces
    del stores


def test_ranks_that_never_arrive_are_named(tmp_path):
    with (
        ThreadPoolExecutor(2) as ranks,
        pytest.raises(RendezvousTimeout, match="ranks 1, 3 of 4 did not arrive within 2 s"),
    ):
        list(ranks.map(lambda rank: meet(rank, 4, LOOPBACK, tmp_path, 2.0), (0, 2)))


def test_a_rank_0_that_never_arrives_is_named(tmp_path):
    with pytest.raises(RendezvousTimeout, match=r"rank 0 of 2 did not arrive within 0\.2 s"):
        meet(1, 2, LOOPBACK, tmp_path, 0.2)
