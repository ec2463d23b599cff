"""File systems that refuse flock and hard links: what uses the one lock of the project works there too."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from durable_files import read_json
from tests.support.tiny_models import TINY

SHIM = """
    #include <errno.h>
    int flock(int fd, int operation) { errno = ENOSYS; return -1; }
    int link(const char *from, const char *to) { errno = EPERM; return -1; }
    int linkat(int a, const char *from, int b, const char *to, int flags) { errno = EPERM; return -1; }
"""
PRELUDE = """
    import errno, fcntl, os, sys
    from pathlib import Path
    folder = Path(sys.argv[1])
    (folder / "probe").touch()
    with open(folder / "probe") as probe:
        for refused in (lambda: fcntl.flock(probe, fcntl.LOCK_EX), lambda: os.link(probe.name, "other")):
            try:
                refused()
                raise SystemExit("the shim is not loaded")
            except OSError as error:
                assert error.errno in (errno.ENOSYS, errno.EPERM), error
"""
Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(textwrap.dedent(SHIM))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c"], check=True)
    return folder / "shim.so"


@pytest.fixture
def python(shim: Path, tmp_path: Path) -> Python:
    """Runs code in a process in which flock and hard links are refused."""

    def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(code), tmp_path, *map(str, arguments)],
            env={**os.environ, "LD_PRELOAD": str(shim)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_convert_without_flock_and_hard_links(
    python: Python, hf_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = hf_folder("source", TINY)
    code = """
        from halo_jobs.cli import app
        app(["convert", sys.argv[2], str(folder / "out"), "--shard-gb", "0.00002", "--part", sys.argv[3]])
    """
    for part in ("0/2", "1/2"):
        done = python(code, source, part)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert (tmp_path / "out" / "TENSORS.json").is_file()
    assert not (tmp_path / "out.unfinished").exists()


def test_token_store_without_flock_and_hard_links(python: Python, tmp_path: Path) -> None:
    code = """
        import numpy as np
        from tokenized_data import TokenStore, TokenStoreWriter
        from tokenized_data.identity import TokenizerIdentity
        tokenizer = TokenizerIdentity("tiny", "0" * 64, 64, 0)
        with TokenStoreWriter(folder / "store", tokenizer, provenance={}, shard_tokens=16384) as writer:
            writer.add_document(np.arange(9))
        print(TokenStore.open(folder / "store").num_tokens)
    """
    done = python(code)
    assert (done.returncode, done.stdout) == (0, "9\n"), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe", "store"]
    assert not (tmp_path / "store" / "owner.json").exists()


HOLD = """
    from durable_files import exclusive
    with exclusive(folder):
        print("held", flush=True)
        sys.stdin.readline() if sys.argv[2] == "wait" else None
"""


def test_a_folder_is_held_by_one_process_without_flock_and_hard_links(
    python: Python, shim: Path, tmp_path: Path
) -> None:
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(HOLD)
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path, "wait"],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        refused = python(HOLD, "go")
        assert refused.returncode == 1
        assert f"is in use by process {holder.pid}; wait for it, or stop it" in refused.stderr
        holder.kill()
    assert python(HOLD, "go").stdout == "held\n", "a killed holder holds nothing"


def test_one_of_many_publishes_without_hard_links(python: Python, tmp_path: Path) -> None:
    code = """
        from durable_files import publish_once
        print(sum(publish_once(folder / f"{n}.json", {"by": os.getpid()}) for n in range(50)), os.getpid())
    """
    with ThreadPoolExecutor(3) as together:
        rivals = [rival.result() for rival in [together.submit(python, code) for _ in range(3)]]
    won = {int(pid): int(count) for count, pid in (rival.stdout.split() for rival in rivals)}
    published = [read_json(tmp_path / f"{n}.json")["by"] for n in range(50)]
    assert won == {pid: published.count(pid) for pid in won}
    assert sum(won.values()) == 50
