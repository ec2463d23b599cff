"""Measures convert, reshard and export on a synthetic full-size Qwen3: throughput against `cp`, memory, round trip.

    python benchmarks/convert.py FOLDER [--shape qwen3-8b] [--json results.json]

FOLDER needs room for three copies of the checkpoint (8B: 50 GB). Every command is compared with a `cp` of its source.
The page cache is dropped before each of them, which needs root; otherwise use a checkpoint larger than memory. Times
include flushing to the disk. Memory is the sampled RssAnon of the largest process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from durable_files import write_json, write_text
from hypenet_megatron.presets import QWEN3_SHAPES, ModelShape
from hypenet_tools.hugging_face.config import ModelDescription, qwen3_config
from hypenet_tools.hugging_face.mapping import hugging_face_shapes
from hypenet_tools.open_model import open_model
from hypenet_tools.verify import compare_tensors
from sharded_tensors.views import TensorInfo, TensorView, blocks
from sharded_tensors.writer import FileTensor, TensorFile, fill_files

HALO = [sys.executable, "-m", "halo_jobs.cli"]
ANON_LIMIT_BYTES = 1.5 * 2**30
MUST, AIM = 0.60, 0.85
NOISE_ROWS = 2**25


class SyntheticTensors(TensorView):
    """bf16 weights from N(0, 0.02). Every tensor starts at its own offset in one long array of noise."""

    def __init__(self, shape: ModelShape) -> None:
        plan = ModelDescription(shape, None, None).plan
        self.infos = {
            name: TensorInfo(size, torch.bfloat16) for name, size in hugging_face_shapes(plan).items()
        }
        noise = torch.randn(NOISE_ROWS, generator=torch.Generator().manual_seed(0)) * 0.02
        self.noise = noise.bfloat16().repeat(2)
        self.begin = {name: 7919 * number % NOISE_ROWS for number, name in enumerate(self.infos)}

    def rows(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        columns = self.infos[name].columns
        at_once = max(1, 2**22 // columns)
        for row in range(start, stop, at_once):
            count = min(at_once, stop - row)
            at = (self.begin[name] + row * columns) % NOISE_ROWS
            yield from blocks(self.noise[at : at + count * columns].view(count, columns))


def make_checkpoint(folder: Path, shape: ModelShape, shard_bytes: int = 4 * 10**9) -> None:
    """Write a Qwen3 folder with a tokenizer of a few words, in shards like those of published models."""
    folder.mkdir(parents=True)
    view = SyntheticTensors(shape)
    filled = fill_files((FileTensor.entire(view, name) for name in view), shard_bytes)
    names = [f"model-{n:05d}-of-{len(filled):05d}.safetensors" for n in range(1, len(filled) + 1)]
    for name, tensors in zip(names, filled, strict=True):
        TensorFile(name, tensors).write(folder)
    weight_map = {t.name: name for name, tensors in zip(names, filled, strict=True) for t in tensors}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", qwen3_config(shape, "bfloat16"))
    vocabulary = {"type": "WordLevel", "vocab": {"<unk>": 0, "<end>": 1}, "unk_token": "<unk>"}
    write_json(folder / "tokenizer.json", {"version": "1.0", "added_tokens": [], "model": vocabulary})
    write_json(folder / "tokenizer_config.json", {"eos_token": "<end>"})
    write_text(folder / "README.md", "---\nlicense: apache-2.0\n---\nSynthetic.\n")


def drop_caches() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def copy_rate(source: Path, scratch: Path) -> float:
    """Measure the bytes per second of `cp -r` and a sync, from a cold cache."""
    size = folder_bytes(source)
    drop_caches()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, scratch], check=True)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(scratch)
    return size / seconds


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def anonymous_bytes(process: psutil.Process) -> int:
    """The largest RssAnon among a process and its children."""
    largest = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            status = Path(f"/proc/{one.pid}/status").read_text()
        except OSError:
            continue
        fields = [line.split() for line in status.splitlines() if line.startswith("RssAnon")]
        largest = max(largest, *(int(field[1]) * 1024 for field in fields), 0)
    return largest


def run(arguments: list[object], source: Path, scratch: Path) -> dict[str, Any]:
    """Measure one halo command from a cold cache, after a `cp` of its source for comparison."""
    rate = copy_rate(source, scratch)
    drop_caches()
    subprocess.run(
        [*HALO, "reshard", source, scratch, "--dry-run"], capture_output=True, check=False
    )  # so that torch is cached
    start = time.perf_counter()
    process = psutil.Popen([*HALO, *map(str, arguments)], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process))
        time.sleep(0.05)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - start
    assert process.returncode == 0, arguments
    out = Path(str(arguments[2]))
    written = folder_bytes(out)
    return {
        "command": " ".join(["halo", *(Path(str(a)).name if "/" in str(a) else str(a) for a in arguments)]),
        "seconds": round(seconds, 2),
        "bytes_written": written,
        "gigabytes_per_second": round(written / seconds / 1e9, 3),
        "cp_gigabytes_per_second": round(rate / 1e9, 3),
        "of_cp": round(written / seconds / rate, 3),
        "peak_anonymous_mib": round(peak / 2**20),
    }


def same_tensors(a: Path, b: Path) -> bool:
    one, other = open_model(a).hugging_face(), open_model(b).hugging_face()
    return one.infos.keys() == other.infos.keys() and not compare_tensors(one, other)


def measure(folder: Path, shape: ModelShape) -> dict[str, Any]:
    teacher, scratch = folder / "teacher", folder / "copy"
    if not teacher.exists():
        make_checkpoint(teacher, shape)
    results = []

    def step(*arguments: object) -> None:
        source = Path(str(arguments[1]))
        results.append(run(list(arguments), source, scratch))
        print(json.dumps(results[-1]), flush=True)

    one, four, back = folder / "one", folder / "four", folder / "back"
    step("convert", teacher, one)
    step("reshard", one, four, "--tp", 4, "--pp", 2)
    shutil.rmtree(one)
    step("export", four, back)
    identical = same_tensors(teacher, back)
    shutil.rmtree(four)
    shutil.rmtree(back)
    step("convert", teacher, folder / "hybrid", "--hybrid", "1,2,4,6,7,10,24", "--tp", 4)
    largest = max(info.nbytes for info in open_model(teacher).stored.infos.values())
    return {
        "environment": {
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cache_dropped": drop_caches(),
        },
        "shape": shape.name,
        "bytes": folder_bytes(teacher),
        "largest_tensor_mib": round(largest / 2**20),
        "memory_limit_mib": round((ANON_LIMIT_BYTES + 2 * largest) / 2**20),
        "round_trip_bit_identical": identical,
        "results": results,
    }


def table(measured: dict[str, Any]) -> str:
    lines = [
        "| command | GB/s | cp GB/s | of cp | peak anonymous MiB |",
        "|---|---|---|---|---|",
    ]
    for row in measured["results"]:
        verdict = "aim" if row["of_cp"] >= AIM else "must" if row["of_cp"] >= MUST else "MISSED"
        lines.append(
            f"| `{row['command']}` | {row['gigabytes_per_second']} | {row['cp_gigabytes_per_second']} | "
            f"{row['of_cp']:.0%} ({verdict}) | {row['peak_anonymous_mib']:,} of {measured['memory_limit_mib']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="qwen3-8b", choices=sorted(QWEN3_SHAPES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measured = measure(options.folder, QWEN3_SHAPES[options.shape])
    if options.json:
        write_json(options.json, measured)
    print(table(measured))


if __name__ == "__main__":
    main()
