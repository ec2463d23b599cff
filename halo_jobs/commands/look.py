"""halo status, logs, metrics, report: what a run folder holds. They write no record and need no right to run."""

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

RunArgument = Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo.")]

_STYLES = {"done": "green", "running": "cyan", "pending": "cyan", "interrupted": "yellow", "failed": "red"}
_BAR_WIDTH = 10
_COLUMNS = ("stage", "state", "tries", "progress", "done", "loss", "tokens/s", "left", "time", "node")
_NUMBERS = ("tries", "done", "loss", "tokens/s", "left", "time")
_DROPPED_FIRST = ("progress", "node", "time", "tries")
_UNBOUNDED = 10_000
_SILENT_SECONDS = (
    60.0  # a living stage shows itself every second; a network file system may hold that back for a while
)


def status(
    run_folder: RunArgument,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object, for scripts: every number that there is.")
    ] = False,
) -> None:
    """Show every stage that was begun: state, attempts, progress, loss, speed, time left, node, why it failed.

    Works beside a run in progress, from another terminal or another machine that sees the folder.
    """
    stages = read_run(run_folder)
    queue = _queue(stages)
    if as_json:
        rows = [{**asdict(stage), "queue": _as_json(queue.get(stage.stage))} for stage in stages]
        content = {"run": run_folder.resolve().name, "stages": rows}
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return
    # A file or a pipe gets everything, whatever width it is thought to have.
    sheet = console if console.is_terminal else Console(width=_UNBOUNDED)
    sheet.print(_widest_fitting(str(run_folder), [_row(stage) for stage in stages], sheet))
    for stage in stages:
        for remark in _remarks(stage, queue.get(stage.stage)):
            console.print(Text(f"{stage.stage} {remark}", _STYLES[stage.state]), soft_wrap=True)


def _queue(stages: list[StageReading]) -> dict[str, LiveJob]:
    """What Slurm, if it is here and answers, has in its queue for stages that are not done."""
    open_stages = [stage for stage in stages if stage.job and stage.state != "done"]
    if not open_stages or shutil.which("squeue") is None:
        return {}
    try:
        live = live_jobs()
    except SchedulerUnreachable as problem:
        errors.print(f"{problem}; what the run's folder says follows", soft_wrap=True, highlight=False)
        return {}
    names = {
        stage.stage: StageJob(stage.stage, StageRecord(Path(stage.folder)), {}).job_name
        for stage in open_stages
    }
    return {stage: live[name][0] for stage, name in names.items() if name in live}


def _as_json(job: LiveJob | None) -> dict[str, str] | None:
    return None if job is None else asdict(job)


def _remarks(stage: StageReading, job: LiveJob | None) -> Iterator[str]:
    if stage.reason:
        yield f"{'restarted after' if stage.state == 'running' else stage.state}: {stage.reason}"
    age = stage.heartbeat_age_seconds
    if age is not None and age > _SILENT_SECONDS:
        yield f"has shown no life for {_duration(age)}; {stage.node} may be gone, or the disk slow"
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
        "left": "" if stage.seconds_left is None else _duration(stage.seconds_left),
        "time": _duration(stage.seconds),
        "node": stage.node,
    }


def _widest_fitting(title: str, rows: list[dict[str, str | Text]], sheet: Console) -> Table:
    """The table with as many columns as `sheet` has room for."""
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
    """Steps or tasks, of how many."""
    if stage.steps:
        return f"{stage.step or 0:,}/{stage.steps:,}"
    return f"{stage.tasks_done}/{stage.tasks}" if stage.tasks else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def logs(
    run_folder: RunArgument,
    stage: Annotated[str, typer.Argument(help="A stage, as `halo status` names it.")],
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Go on with what comes, across restarts, until it is done."),
    ] = False,
) -> None:
    """Print what a stage's newest attempt has logged, and its ranks; of a job that never began, the scheduler's log."""
    from halo_reports.monitoring.logs import StageLog, stage_record

    log = StageLog(stage_record(run_folder, stage))
    for line in log.follow() if follow else log.read():
        print(line, flush=follow)


def metrics(
    run_folder: Annotated[Path, typer.Argument(help="A run's folder, or the folder of all runs.")],
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")] = 9838,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file", help="Made at first start; by default halo/metrics.token in your configuration."
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Print the metrics and end; no port, no token.")
    ] = False,
) -> None:
    """Serve a run's metrics to Prometheus, or those of all runs in a folder, until Ctrl-C.

    Reads run folders only: start it on any machine that sees them, whatever executes the stages. docs/watching.md has
    the names of the metrics, the scrape configuration and the Grafana dashboard.
    """
    from halo_reports.monitoring.exporter import (
        MetricsServer,
        default_token_file,
        exposition,
        read_or_make_token,
    )

    if not run_folder.is_dir():
        raise ValueError(f"{run_folder} is not a folder; give a run's folder, or that of all runs")
    if once:
        sys.stdout.write(exposition(run_folder))
        return
    path = token_file or default_token_file()
    token = read_or_make_token(path)
    try:
        server = MetricsServer(run_folder, token, port)
    except OSError as error:
        raise ValueError(f"port {port} cannot be had: {error.strerror}; choose another with --port") from None
    console.print(f"{server.url} serves {run_folder}, runs now: {len(find_runs(run_folder))}", soft_wrap=True)
    console.print(f"Bearer token: {path}", soft_wrap=True, highlight=False)
    with server:
        server.serve_forever()


def report(run_folder: RunArgument) -> None:
    """Write report.html again, from whatever the stages have published so far."""
    check_run(run_folder)
    folders = {row.record.stage: row.record.folder for row in latest_of_each_stage(run_folder)}
    from halo_cluster import storage_errors
    from halo_reports import build_report

    with storage_errors(run_folder):
        page = build_report(run_folder, folders, run_folder / "report.html")
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)
