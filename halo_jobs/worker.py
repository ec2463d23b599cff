"""A training stage in several processes: what the driver hands them, and the body of each.

    python -m halo_jobs.worker <attempt folder>

attempt.<n>/work.json      the stage, its recipe and its folders
            result.json    what process 0 made
            failure.json   what the first process that failed had to say
            ended.json     which process of another node ended, and how
            rank-<k>.txt   what process k logged

Exit codes as of `halo` itself: 0, 1, and STOPPED_EXIT_CODE after a stop on request.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from durable_files import publish_once, read_json, write_json
from halo_cluster import (
    THIS_MACHINE,
    Nodes,
    RankFailed,
    StageRecord,
    StageResult,
    StopRequested,
    end_with_parent,
    rank_log,
    run_ranks,
)
from halo_cluster.attempts import use_room
from halo_cluster.record import DONE_FILE
from halo_cluster.storage import storage_sentence
from halo_jobs.attempt import FAILURE, JoinedAttempt
from halo_jobs.terminal import STOPPED_EXIT_CODE, quieten_libraries, sentence

if TYPE_CHECKING:
    from halo_training.trainer import AttemptInProgress

WORK, RESULT, ENDED = "work.json", "result.json", "ended.json"
EXIT = "exit.json"
_RESUMES = "the same command goes on from the last checkpoint"
_LOOK_SECONDS = 0.2
_HEARSAY_SECONDS = 2.0
_STORY_SECONDS = 30.0


def run_in_processes(
    attempt: Path, work: dict[str, Any], processes: int, nodes: Nodes = THIS_MACHINE
) -> StageResult:
    """Run work["stage"] of work["recipe"] in `processes` processes, in work["folder"] and from work["inputs"].

    Called on the first of `nodes`; the others call `join_processes`. ValueError or StopRequested with the sentence of
    the process that raised it, RankFailed if one ended otherwise.
    """
    write_json(attempt / WORK, work)
    try:
        run_ranks(_command(attempt), processes, attempt, nodes, (attempt / ENDED).exists)
    except RankFailed as failed:
        if nodes.count > 1:
            time.sleep(_HEARSAY_SECONDS)
        raise _what_it_said(attempt, failed) from None
    result = read_json(attempt / RESULT)
    return StageResult([attempt.parent / output for output in result["outputs"]], result["summary"])


def join_processes(attempt: Path, processes: int, nodes: Nodes) -> int:
    """Run this node's part of what `run_in_processes` runs on the first one; an exit code as of `halo` itself."""
    while not (attempt / WORK).exists():
        # A job that was put back into the queue after its stage was done makes no attempt.
        if (attempt / EXIT).exists() or (attempt.parent / DONE_FILE).exists():
            return 0
        time.sleep(_LOOK_SECONDS)
    try:
        run_ranks(_command(attempt), processes, attempt, nodes)
    except RankFailed as failed:
        if failed.code == STOPPED_EXIT_CODE:
            return STOPPED_EXIT_CODE
        ended = {"sentence": f"{failed} on {failed.host}", "host": failed.host, "killed": failed.code < 0}
        publish_once(attempt / ENDED, ended)
        # The end of one task ends the others at once; the first node is to have told its story by then.
        deadline = time.monotonic() + _STORY_SECONDS
        while not (attempt / EXIT).exists() and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return 1
    return 0


def _command(attempt: Path) -> list[str]:
    return [sys.executable, "-m", "halo_jobs.worker", str(attempt)]


def _what_it_said(attempt: Path, failed: RankFailed) -> Exception:
    """The failed process's own error, its traceback as a note; of one that was killed, that."""
    elsewhere = read_json(attempt / ENDED) if (attempt / ENDED).exists() else None
    spoken = (attempt / FAILURE).exists()
    if elsewhere and (elsewhere["killed"] or not (spoken or failed.code < 0)):
        return RankFailed(f"{elsewhere['sentence']}; {_RESUMES}", failed.code, elsewhere["host"])
    if failed.code < 0 or not spoken:
        return RankFailed(f"{failed}; {_RESUMES}", failed.code)
    failure = read_json(attempt / FAILURE)
    if failed.code == STOPPED_EXIT_CODE:
        return StopRequested(failure["sentence"], by_user=failure["final"])
    if failure["final"]:
        error: Exception = ValueError(failure["sentence"])
    else:
        error = RankFailed(failure["sentence"], failed.code, failure["host"])
    error.add_note(f"in process {failure['rank']}:\n{failure['traceback']}")
    return error


def run_stage(work: dict[str, Any], attempt: AttemptInProgress, console: Console) -> StageResult:
    """This process's part of the stage, in the world that its environment names or alone."""
    from halo_jobs.stages import table
    from halo_jobs.work import StageWork

    return table.run_stage(StageWork.from_json(work), attempt, console)


def _stop_outside_training(attempt: Path, rank: int) -> None:
    """A request to stop that comes while modules and weights are still being loaded; a trainer heeds later ones.

    So does the time after its last step, when the weights are written: both begin again from the last checkpoint.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        said = f"stopped by {signal.Signals(number).name} while it was not training"
        publish_once(
            attempt / FAILURE, {"rank": rank, "host": "", "sentence": said, "final": False, "traceback": ""}
        )
        os._exit(STOPPED_EXIT_CODE)

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, stop)


def _end_by_ourselves() -> None:
    """Who fails takes the others along, and the signals that end them come here too; first our own story is told."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _is_about_another(problem: Exception) -> bool:
    """Whether it went wrong in another process, and here as a consequence."""
    if isinstance(problem, ImportError):  # of torch, perhaps
        return False
    from halo_training.supervision import PeerLost, is_lost_peer
    from hypenet_megatron.runtime import NobodyCame

    return isinstance(problem, PeerLost | NobodyCame) or is_lost_peer(problem)


def _sentence(stage_folder: Path, problem: Exception) -> str:
    if isinstance(problem, OSError) and problem.errno is not None:
        return storage_sentence(stage_folder, problem)
    return sentence(problem)


def main(attempt: Path, rank: int) -> int:
    _stop_outside_training(attempt, rank)
    logging.basicConfig(filename=rank_log(attempt, rank))
    quieten_libraries()
    work = read_json(attempt / WORK)
    joined = JoinedAttempt(StageRecord(Path(work["folder"])), attempt, rank)
    try:
        result = run_stage(work, joined, Console(quiet=rank > 0))
    except Exception as problem:
        _end_by_ourselves()
        use_room(attempt)
        publish_once(
            attempt / FAILURE,
            {
                "rank": rank,
                "host": "" if _is_about_another(problem) else socket.gethostname(),
                "sentence": _sentence(Path(work["folder"]), problem),
                "final": isinstance(problem, ValueError) or getattr(problem, "by_user", False),
                "traceback": traceback.format_exc(),
            },
        )
        return STOPPED_EXIT_CODE if isinstance(problem, StopRequested) else 1
    if rank == 0:
        outputs = [str(output.relative_to(work["folder"])) for output in result.outputs]
        write_json(attempt / RESULT, {"outputs": outputs, "summary": result.summary})
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(Path(sys.argv[1]), int(os.environ["RANK"])))
