"""Several GPUs of one host: the same numbers in every layout, what they cost, and what happens when a rank dies.

    python benchmarks/multi_gpu.py --out results/ --only correctness,faults,long --seconds 520
    python benchmarks/multi_gpu.py --out results/ --only speed --seconds 520

correctness  align, distill and finetune in every layout that fits, against one GPU, and a checkpoint of all GPUs
             continued on half of them and on one: the loss of every step.
speed        tokens per second and GPU, memory, exposed communication, and the stall of a save.
long         finetuning on one window of 131,072 and of 524,288 tokens, split over the GPUs.
faults       a recipe with `halo run` in several processes: once undisturbed, once with a rank killed.

Runs on 1, 2, 4 or 8 GPUs, or with gloo on CPU (`--device cpu`) in tiny shapes. One set of processes does the rows of a
world one after the other; `run_ranks` starts them, as it starts those of a training stage. Results go to multi_gpu.json
after every row; a later call with the same --out adds to them. Rows that fail are rows too.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# NVLink multicast (NVLS) off for every process that is started here: a rank killed in the middle of it, as is done
# here on purpose, can leave the switch of a host whose GPUs others share unusable until it is reset.
os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "4")
os.environ.setdefault("PYTHONWARNINGS", "ignore")  # Megatron speaks of absent Apex and Transformer Engine
# What is started here imports the tree that this file is in.
ROOT = Path(__file__).resolve().parent.parent
_PATHS = [str(ROOT / name) for name in ("", "kernels", "cluster", "tools")]
os.environ["PYTHONPATH"] = os.pathsep.join([*_PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
sys.path[:0] = _PATHS

import multi_gpu_plan as plan  # noqa: E402
from multi_gpu_faults import halo_runs  # noqa: E402
from multi_gpu_plan import Row, WorldPlan  # noqa: E402
from multi_gpu_table import tables  # noqa: E402
from rich.console import Console  # noqa: E402

from durable_files import read_json, write_json  # noqa: E402
from halo_cluster.ranks import RankFailed, run_ranks  # noqa: E402

PARTS = ("correctness", "faults", "long", "speed")
RESULTS = "multi_gpu.json"
RANK_PROGRAM = Path(__file__).with_name("multi_gpu_ranks.py")


class Results:
    """multi_gpu.json: rows by name, what they were to do and what came of it."""

    def __init__(self, folder: Path, console: Console):
        self.path, self.console, self.started = folder / RESULTS, console, time.monotonic()
        self.content: dict[str, Any] = read_json(self.path) if self.path.exists() else {"rows": {}}
        self.planned: dict[str, Row] = {}
        self.done: set[str] = set()
        """Rows of this call that went well."""

    def report(self, name: str, result: dict[str, Any]) -> None:
        row = self.planned.get(name)
        if environment := result.pop("environment", None):
            self.content.setdefault("environment", {**environment, **_environment()})
        result = {**(row.to_json() | {"place": row.place} if row else {"work": "faults"}), **result}
        self.content["rows"][name] = result
        if "error" not in result:
            self.done.add(name)
            if row and row.work == "check":
                self._compare()
        write_json(self.path, self.content)
        said = result.get("error") or result.get("verdict") or "done"
        self.console.print(
            f"{time.monotonic() - self.started:6.1f} s  {name}: {said}", markup=False, soft_wrap=True
        )

    def _compare(self) -> None:
        """Give every check a verdict as soon as what it is compared with is there."""
        rows = self.content["rows"]
        for name, result in rows.items():
            row = self.planned.get(name)
            if row is None or row.work != "check" or "losses" not in result or "verdict" in result:
                continue
            other = rows.get(row.continues or plan.baseline_name(row), {}).get("losses")
            if other is None:
                continue
            differences = [
                abs(here - there) / abs(there)
                for here, there in zip(result["losses"], other[-len(result["losses"]) :], strict=True)
            ]
            bound = plan.bound(row)
            result |= {"largest_difference": max(differences), "bound": bound}
            result["verdict"] = "within" if max(differences) <= bound else "beyond the bound"


class World:
    """One set of processes at work on rows. They leave what came of row n in `folder`/n.<rank>.json."""

    def __init__(self, rows: list[Row], folder: Path, results: Results):
        self.left, self.folder, self._results = list(rows), folder, results
        self._next = 0
        self._ended = threading.Event()

    def run(self, ranks: int, device: str, end: float) -> None:
        """Do the rows until one fails; `left` are then the rows after it."""
        self.folder.mkdir(parents=True)
        write_json(self.folder / "rows.json", {"rows": [row.to_json() for row in self.left], "end": end})
        reporter = threading.Thread(target=self._report_until_ended)
        reporter.start()
        reason = "the processes ended without a word"
        try:
            run_ranks([sys.executable, str(RANK_PROGRAM), str(self.folder), device], ranks, self.folder)
        except RankFailed as failure:
            reason = str(failure)
        finally:
            self._ended.set()
            reporter.join()
        if self.left:
            failed = self.left.pop(0)
            said = [answer["error"] for answer in self._answers(failed.ranks) if "error" in answer]
            self._results.report(failed.name, {"error": said[0] if said else reason})

    def _answers(self, ranks: int) -> list[dict[str, Any]]:
        paths = [self.folder / f"{self._next}.{rank}.json" for rank in range(ranks)]
        return [read_json(path) for path in paths if path.exists()]

    def _report_until_ended(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(0.2)
            while self.left:
                answers = self._answers(self.left[0].ranks)
                if len(answers) < self.left[0].ranks or any("error" in answer for answer in answers):
                    break
                self._results.report(self.left.pop(0).name, _together(answers))
                self._next += 1


def _together(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of what all ranks say: the first one's, of memory the most, of shares of time the mean."""
    result = dict(answers[0])
    for key in result:
        values = [answer[key] for answer in answers]
        if key.startswith("peak"):
            result[key] = max(values)
        elif key.endswith("share"):
            result[key] = sum(values) / len(values)
    return result


def run_world(plan: WorldPlan, scratch: Path, device: str, results: Results, end: float) -> None:
    """All rows of `plan`; after one that failed new processes do the rest. None begins after `end` (time.time())."""
    left = list(plan.rows)
    while left:
        runnable = []
        for row in left:
            if time.time() > end:
                results.report(row.name, {"error": "not run: the time given was up"})
            elif row.continues and row.continues not in results.done:
                results.report(row.name, {"error": f"not run: it continues {row.continues}"})
            else:
                runnable.append(row)
        if not runnable:
            return
        world = World(runnable, scratch / "worlds" / f"{plan.name} {len(left)}".replace(" ", "_"), results)
        world.run(plan.ranks, device, end)
        left = world.left


def _environment() -> dict[str, Any]:
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {
        "commit": commit.strip() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "cpus": os.cpu_count(),
        "variables": {key: value for key, value in os.environ.items() if key.startswith(("NCCL_", "CUDA_", "TORCH_"))},
    }  # fmt: skip


def visible_gpus() -> int:
    """Without a CUDA context in this process, which would take memory of the first one."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len(list(filter(None, listed.split(","))))
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def planned(parts: list[str], gpus: int, device: str) -> list[WorldPlan]:
    """Checks come before timings."""
    plans: list[WorldPlan] = []
    if "correctness" in parts:
        plans += plan.correctness(gpus, plan.SMALL if device == "cuda" else plan.TINY)
    if "long" in parts:
        plans += plan.long_contexts(gpus) if device == "cuda" else []
    if "speed" in parts:
        plans += plan.speed(gpus) if device == "cuda" else plan.speed_on_cpu(gpus)
    return plans


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {RESULTS}")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by commas (default: all)")
    parser.add_argument("--rows", default="", help="only rows whose name this regular expression is found in")
    parser.add_argument("--seconds", type=float, default=3600.0, help="what is not done by then is not run")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    parser.add_argument("--processes", type=int, default=2, help="with --device cpu: how many (default 2)")
    parser.add_argument(
        "--disk", type=Path, help="where checkpoints are written (default: a temporary folder)"
    )
    parser.add_argument("--list", action="store_true", help="print the rows and run nothing")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--only names {unknown[0]!r}; give some of {', '.join(PARTS)}")
    device = options.device or ("cuda" if visible_gpus() else "cpu")
    gpus = options.processes if device == "cpu" else visible_gpus()
    if gpus not in (1, 2, 4, 8):
        parser.error(f"{gpus} GPUs are visible; choose 1, 2, 4 or 8 of them with CUDA_VISIBLE_DEVICES")
    console = Console(width=200, highlight=False)
    plans = plan.only(planned(parts, gpus, device), options.rows)
    if options.list:
        for one in plans:
            console.print(f"{one.name}: {', '.join(row.name for row in one.rows)}", soft_wrap=True)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out, console)
    results.planned = {row.name: row for one in plans for row in one.rows}
    end = time.time() + options.seconds
    with tempfile.TemporaryDirectory(dir=options.disk, ignore_cleanup_errors=True) as name:
        for one in plans:
            if not one.timed:
                run_world(one, Path(name), device, results, end)
        if "faults" in parts and gpus > 1:
            halo_runs(min(4, gpus), Path(name), device, results.report)
        for one in plans:
            if one.timed:
                run_world(one, Path(name), device, results, end)
    for table in tables(results.content):
        console.print(table)
    failed = [name for name, row in results.content["rows"].items() if "error" in row]
    beyond = [
        name for name, row in results.content["rows"].items() if row.get("verdict") == "beyond the bound"
    ]
    console.print(
        f"{len(results.content['rows'])} rows, {len(failed)} failed, {len(beyond)} beyond their bound; "
        f"{results.path}, {time.monotonic() - results.started:.0f} s"
    )


if __name__ == "__main__":
    main()
