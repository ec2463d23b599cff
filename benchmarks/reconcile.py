"""Measures one pass of the reconciler over 500 synthetic stages on a real Slurm: its time and its calls of Slurm.

    make slurm-sandbox; export SLURM_CONF=...
    python benchmarks/reconcile.py FOLDER [--stages 500] [--json results.json]

Half of the stages are done. The others are held jobs in the queue. The first pass is that of a new reconciler. Then a
hundred jobs are cancelled, and a second pass asks the accounting database for them. The results of every pass are
checked. FOLDER must be new. The jobs are removed at the end.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / name) for name in ("", "cluster")]

from rich.console import Console  # noqa: E402

from durable_files import write_json  # noqa: E402
from halo_cluster.jobs import StageJob  # noqa: E402
from halo_cluster.reconcile import Reconciler  # noqa: E402
from halo_cluster.record import StageRecord  # noqa: E402
from halo_cluster.slurm import Slurm, SlurmSettings, queue  # noqa: E402

MUST_SECONDS, MUST_MEGABYTES = 5.0, 200.0
CANCELLED = 100
_INPUT_HASH = "0123456789ab"


def finish(job: StageJob) -> None:
    attempt = job.record.begin_attempt()
    output = job.record.folder / "output"
    output.write_text("made")
    attempt.publish([output], {})


def hold(folder: Path, jobs: Sequence[StageJob]) -> list[str]:
    """Submit held jobs with the names of `jobs`; returns their ids."""
    script = folder / "held.sh"
    script.write_text("#!/bin/sh\n")
    common = ["sbatch", "--parsable", "--hold", f"--chdir={folder}", "--output=/dev/null"]
    return [
        subprocess.run(
            [*common, f"--job-name={job.job_name}", str(script)], capture_output=True, text=True, check=True
        ).stdout.strip()
        for job in jobs
    ]


class Calls:
    """Counts the calls of Slurm commands."""

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()
        self._call = queue.call
        queue.call = self._counted  # type: ignore[assignment]

    def _counted(self, command: Sequence[str]) -> str:
        self.made[command[0]] += 1
        return self._call(command)


def look(reconciler: Reconciler, calls: Calls) -> dict[str, Any]:
    calls.made.clear()
    begun = time.monotonic()
    assert not reconciler.step()
    return {"seconds": round(time.monotonic() - begun, 3), "calls": dict(calls.made)}


def peak_megabytes() -> float:
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kibibytes) * 1024 / 1e6


def measure(folder: Path, stages: int) -> dict[str, Any]:
    jobs = [StageJob(f"stage{n}", StageRecord(folder / f"stage{n}" / _INPUT_HASH), {}) for n in range(stages)]
    finished, waiting = jobs[::2], jobs[1::2]
    for job in finished:
        finish(job)
    ids = hold(folder, waiting)
    calls = Calls()
    try:
        begun = time.monotonic()
        reconciler = Reconciler(jobs, Slurm(SlurmSettings(), module=()), Console(quiet=True))
        made = round(time.monotonic() - begun, 3)
        first = look(reconciler, calls)
        assert reconciler.published.keys() == {job.name for job in finished}
        queue.cancel(ids[:CANCELLED])
        second = look(reconciler, calls)
        # No job is submitted again yet: the accounting database may lag behind the queue.
        assert second["calls"] == {"squeue": 1, "sacct": 1}, second
    finally:
        queue.cancel(ids)
    return {
        "stages": stages,
        "made_seconds": made,
        "first_look": first,
        "look_after_cancelling": second,
        "peak_megabytes": round(peak_megabytes(), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    measured = measure(options.folder.resolve(), options.stages)
    if options.json:
        write_json(options.json, measured)
    whole = measured["made_seconds"] + measured["first_look"]["seconds"]
    for what, found, must, unit in (
        ("first look of a new command", whole, MUST_SECONDS, "s"),
        ("look after a hundred jobs ended", measured["look_after_cancelling"]["seconds"], MUST_SECONDS, "s"),
        ("peak memory", measured["peak_megabytes"], MUST_MEGABYTES, "MB"),
    ):
        print(f"{what}: {found:.2f} {unit} ({'must' if found < must else 'MISSED'}: {must:g})")
    print(f"calls: {measured['first_look']['calls']}, then {measured['look_after_cancelling']['calls']}")


if __name__ == "__main__":
    main()
