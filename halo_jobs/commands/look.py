"""halo status, logs, metrics, report: they read a run's folder, and take no lock on it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from halo_cluster import StageRecord
from halo_cluster.jobs import LiveJob, SchedulerUnreachable, StageJob
from halo_cluster.slurm.queue import live_jobs
from halo_jobs.commands.consoles import console, errors
from halo_reports.monitoring.readings import (
    StageReading,
    check_run,
    find_runs,
    latest_of_each_stage,
    read_run,
)
from terminal_output import duration

RunArgument = Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo.")]

_STYLES = {"done": "green", "running": "cyan", "pending": "cyan", "interrupted": "yellow", "failed": "red"}
_BAR_WIDTH = 10
_COLUMNS = ("stage", "state", "tries", "progress", "done", "loss", "tokens/s", "left", "time", "node")
_NUMBERS = ("tries", "done", "loss", "tokens/s", "left", "time")
_DROPPED_FIRST = ("progress", "node", "time", "tries")
_UNBOUNDED = 10_000
# Heartbeats come every second, but a network file system may show them late.
_SILENT_SECONDS = 60.0


def status(
    run_folder: RunArgument,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, for scripts.")
    ] = False,
) -> None:
    """Show every stage that has started: state, attempts, progress, loss, speed, time left, node, why it failed.

    Works during a run, from another terminal or any machine that sees the folder.

    --json prints an object with `run` (its name) and `stages`. Keys of a stage: stage, input_hash, folder, state,
    attempts, attempt, job, started, seconds, node, reason, step, steps, loss, learning_rate, gradient_norm,
    tokens_per_second, tasks_done, tasks, progress, seconds_left, checkpoint_step, checkpoint_age_seconds,
    heartbeat_age_seconds, host_memory_bytes, gpu_memory_bytes, queue. A value that is not known is null.
    """
    stages = read_run(run_folder)
    queue = _queue(stages)
    if as_json:
        jobs = {stage: asdict(job) for stage, job in queue.items()}
        rows = [{**asdict(stage), "queue": jobs.get(stage.stage)} for stage in stages]
        content = {"run": run_folder.resolve().name, "stages": rows}
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return
    # Output to a file or a pipe is not cut to a terminal's width.
    sheet = console if console.is_terminal else Console(width=_UNBOUNDED)
    sheet.print(_widest_fitting(str(run_folder), [_row(stage) for stage in stages], sheet))
    for stage in stages:
        for remark in _remarks(stage, queue.get(stage.stage)):
            console.print(Text(f"{stage.stage} {remark}", _STYLES[stage.state]), soft_wrap=True)


def _queue(stages: list[StageReading]) -> dict[str, LiveJob]:
    """Slurm's jobs of the unfinished stages; empty if Slurm is not here or does not answer."""
    open_stages = [stage for stage in stages if stage.job and stage.state != "done"]
    if not open_stages or shutil.which("squeue") is None:
        return {}
    try:
        live = live_jobs()
    except SchedulerUnreachable as problem:
        errors.print(f"{problem}; showing what the run's folder says", soft_wrap=True, highlight=False)
        return {}
    names = {
        stage.stage: StageJob(stage.stage, StageRecord(Path(stage.folder)), {}).job_name
        for stage in open_stages
    }
    return {stage: live[name][0] for stage, name in names.items() if name in live}


def _remarks(stage: StageReading, job: LiveJob | None) -> Iterator[str]:
    if stage.reason:
        yield f"{'restarted after' if stage.state == 'running' else stage.state}: {stage.reason}"
    age = stage.heartbeat_age_seconds
    if age is not None and age > _SILENT_SECONDS:
        yield f"sent its last heartbeat {duration(age)} ago; {stage.node} may be down, or the disk slow"
    if job is not None:
        where = f" on {job.nodes}" if job.nodes else f" ({job.reason})"
        yield f"is job {job.job}, {job.state}{where}"


def _row(stage: StageReading) -> dict[str, str | Text]:
    return {
        "stage": stage.stage,
        "state": Text(stage.state, _STYLES[stage.state]),
        "tries": str(stage.attempts),
        "progress": "" if stage.progress is None else _bar(stage.progress),
        "done": _done(stage),
        "loss": "" if stage.loss is None else f"{stage.loss:.4g}",
        "tokens/s": "" if stage.tokens_per_second is None else f"{stage.tokens_per_second:,.0f}",
        "left": "" if stage.seconds_left is None else duration(stage.seconds_left),
        "time": duration(stage.seconds),
        "node": stage.node,
    }


def _widest_fitting(title: str, rows: list[dict[str, str | Text]], sheet: Console) -> Table:
    """The table with as many columns as fit on `sheet`."""
    for count in range(len(_DROPPED_FIRST) + 1):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        shown = [column for column in _COLUMNS if column not in _DROPPED_FIRST[:count]]
        for column in shown:
            table.add_column(column, no_wrap=True, justify="right" if column in _NUMBERS else "left")
        for row in rows:
            table.add_row(*(row[column] for column in shown))
        if Measurement.get(sheet, sheet.options.update(width=_UNBOUNDED), table).maximum <= sheet.width:
            break
    return table


def _bar(progress: float) -> str:
    filled = int(progress * _BAR_WIDTH)
    return "█" * filled + "░" * (_BAR_WIDTH - filled)


def _done(stage: StageReading) -> str:
    """Steps or tasks done, of their total."""
    if stage.steps:
        return f"{stage.step or 0:,}/{stage.steps:,}"
    return f"{stage.tasks_done}/{stage.tasks}" if stage.tasks else ""


def logs(
    run_folder: RunArgument,
    stage: Annotated[str, typer.Argument(help="A stage, as in `halo status`.")],
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Print new lines as they come, across restarts, until it is done."),
    ] = False,
) -> None:
    """Print the log of a stage's newest attempt and of its ranks, or the scheduler's log if the job never started."""
    from halo_reports.monitoring.logs import StageLog, stage_record

    log = StageLog(stage_record(run_folder, stage))
    for line in log.follow() if follow else log.read():
        print(line, flush=follow)


def metrics(
    run_folder: Annotated[Path, typer.Argument(help="A run's folder, or the folder of all runs.")],
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")
    ] = 9838,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file", help="Bearer token, created if missing. Default: halo/metrics.token in your configuration."
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Print the metrics once and exit, without a server.")
    ] = False,
) -> None:
    """Serve the metrics of a run, or of all runs in a folder, to Prometheus until Ctrl-C.

    Reads run folders only, so it works on any machine that sees them. docs/watching.md lists the metrics and shows the
    scrape configuration and the Grafana dashboard.
    """
    from halo_reports.monitoring.exporter import (
        MetricsServer,
        default_token_file,
        exposition,
        read_or_make_token,
    )

    if not run_folder.is_dir():
        raise ValueError(f"{run_folder} is not a folder; give the folder of a run, or of all runs")
    if once:
        sys.stdout.write(exposition(run_folder))
        return
    path = token_file or default_token_file()
    token = read_or_make_token(path)
    try:
        server = MetricsServer(run_folder, token, port)
    except OSError as error:
        raise ValueError(
            f"cannot listen on port {port}: {error.strerror}; choose another with --port, or 0 for a free one"
        ) from None
    console.print(f"{server.url} serves {run_folder}; runs found: {len(find_runs(run_folder))}", soft_wrap=True)
    console.print(f"Bearer token: {path}", soft_wrap=True, highlight=False)
    with server:
        server.serve_forever()


def report(run_folder: RunArgument) -> None:
    """Write report.html from what the stages have published so far."""
    check_run(run_folder)
    folders = {row.record.stage: row.record.folder for row in latest_of_each_stage(run_folder)}
    from halo_cluster import storage_errors
    from halo_reports.build import build_report

    with storage_errors(run_folder):
        page = build_report(run_folder, folders, run_folder / "report.html")
    console.print(f"Report: {page.resolve().as_uri()}", soft_wrap=True, highlight=False)
