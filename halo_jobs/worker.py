"""A training stage in several processes: what the driver hands them, and the body of each.

    python -m halo_jobs.worker <attempt folder>

attempt.<n>/work.json      the stage, its recipe and its folders
            result.json    what process 0 made
            failure.json   what the first process that failed had to say
            rank-<k>.txt   what process k logged

Exit codes as of `halo` itself: 0, 1, and STOPPED_EXIT_CODE after a stop on request.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durable_files import publish_once, read_json, write_json
from halo_cluster import (
    RankFailed,
    StageRecord,
    StageResult,
    StopRequested,
    end_with_parent,
    rank_log,
    run_ranks,
)
from halo_jobs.terminal import STOPPED_EXIT_CODE, quieten_libraries, sentence

WORK, RESULT, FAILURE = "work.json", "result.json", "failure.json"


def run_in_processes(attempt: Path, work: dict[str, Any], processes: int) -> StageResult:
    """Run work["stage"] of work["recipe"] in `processes` processes, in work["folder"] and from work["inputs"].

    ValueError or StopRequested with the sentence of the process that raised it, RankFailed if one ended otherwise.
    """
    write_json(attempt / WORK, work)
    try:
        run_ranks([sys.executable, "-m", "halo_jobs.worker", str(attempt)], processes, attempt)
    except RankFailed as failed:
        raise _what_it_said(attempt, failed) from None
    result = read_json(attempt / RESULT)
    return StageResult([Path(output) for output in result["outputs"]], result["summary"])


def _what_it_said(attempt: Path, failed: RankFailed) -> Exception:
    """The failed process's own error, its traceback as a note; of one that was killed, that."""
    if failed.code < 0 or not (attempt / FAILURE).exists():
        return RankFailed(f"{failed}; the same command goes on from the last checkpoint", failed.code)
    failure = read_json(attempt / FAILURE)
    if failed.code == STOPPED_EXIT_CODE:
        return StopRequested(failure["sentence"])
    user_error = failure["user_error"]
    error = ValueError(failure["sentence"]) if user_error else RankFailed(failure["sentence"], failed.code)
    error.add_note(f"in process {failure['rank']}:\n{failure['traceback']}")
    return error


@dataclass(frozen=True)
class JoinedAttempt:
    """The driver's attempt as one of its processes knows it."""

    record: StageRecord
    folder: Path
    rank: int

    def fail(self, reason: str) -> None:
        """Leave the reason for the driver, who records how the attempt ended. The first process to speak is heard."""
        content = {"rank": self.rank, "sentence": reason, "user_error": False, "traceback": ""}
        publish_once(self.folder / FAILURE, content)


def _run_stage(attempt: Path, work: dict[str, Any], rank: int) -> StageResult:
    """This process's part of the stage."""
    from rich.console import Console

    from halo_jobs.graph import stage_nodes
    from halo_jobs.models import layout_of
    from halo_jobs.recipe import recipe_class
    from halo_jobs.stages.context import StageContext
    from hypenet_megatron.runtime import model_parallel

    recipe = recipe_class(work["recipe"]).model_validate(work["recipe"])
    node = next(node for node in stage_nodes(recipe) if node.name == work["stage"])
    inputs = {name: Path(folder) for name, folder in work["inputs"].items()}
    folder, console, layout = Path(work["folder"]), Console(quiet=rank > 0), layout_of(recipe)
    joined = JoinedAttempt(StageRecord(folder), attempt, rank)
    with model_parallel(layout, seed=recipe.seed) as device:
        return node.run(StageContext(node.name, recipe, folder, inputs, console, device, joined, layout))


def main(attempt: Path, rank: int) -> int:
    logging.basicConfig(filename=rank_log(attempt, rank))
    quieten_libraries()
    try:
        result = _run_stage(attempt, read_json(attempt / WORK), rank)
    except Exception as problem:
        publish_once(
            attempt / FAILURE,
            {
                "rank": rank,
                "sentence": sentence(problem),
                "user_error": isinstance(problem, ValueError),
                "traceback": traceback.format_exc(),
            },
        )
        return STOPPED_EXIT_CODE if isinstance(problem, StopRequested) else 1
    if rank == 0:
        outputs = [str(output) for output in result.outputs]
        write_json(attempt / RESULT, {"outputs": outputs, "summary": result.summary})
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(Path(sys.argv[1]), int(os.environ["RANK"])))
