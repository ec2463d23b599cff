"""Tables of multi_gpu.json: a line per layout, failures included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from multi_gpu_plan import STAGES, Row, baselines
from rich.table import Table

Rows = dict[str, dict[str, Any]]


def tables(content: dict[str, Any]) -> Iterator[Table]:
    rows: Rows = content["rows"]
    by_work = {
        work: {name: row for name, row in rows.items() if row["work"] == work}
        for work in ("check", "speed", "stall", "faults")
    }
    for work, table in (("check", _checks), ("speed", _speed), ("stall", _stall), ("faults", _faults)):
        if by_work[work]:
            yield table(by_work[work])


def _short(error: str) -> str:
    return error if len(error) <= 150 else error[:147] + "..."


def _difference(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "not run" if row["error"].startswith("not run") else "failed"
    return f"{row['largest_difference']:.1e}" if "largest_difference" in row else "done"


def _checks(rows: Rows) -> Table:
    """A line per layout and precision; cells are the largest relative difference of a loss."""
    table = Table(
        "",
        "precision",
        "GPUs",
        *STAGES,
        "bound",
        "",
        title="Losses against one GPU; resumed: against the run that saved",
    )
    lines: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for name, row in rows.items():
        kind = name.split()[0]
        lines.setdefault((kind, row["place"], row["precision"]), {})[row["stage"]] = row
    for (kind, place, precision), stages in lines.items():
        cells = [_difference(stages.get(stage)) for stage in STAGES]
        some = next(iter(stages.values()))
        bound = ", ".join(dict.fromkeys(f"{row['bound']:.0e}" for row in stages.values() if "bound" in row))
        remarks = [_short(row["error"]) for row in stages.values() if "error" in row]
        remarks += [row["verdict"] for row in stages.values() if row.get("verdict") == "beyond the bound"]
        remark = "; ".join(dict.fromkeys(remarks))
        table.add_row(f"{kind} {place}", precision, str(some["ranks"]), *cells, bound, remark)
    return table


def _speed(rows: Rows) -> Table:
    table = Table(
        "model", "stage", "context", "layout", "GPUs", "s/step", "tokens/s/GPU", "efficiency", "peak GiB",
        "communication", "exposed", "", title="Speed, bf16; efficiency against the fewest GPUs that did the same work",
    )  # fmt: skip
    done = {name: row for name, row in rows.items() if "error" not in row}
    fields = Row.__dataclass_fields__
    against = baselines([Row.from_json({key: row[key] for key in fields}) for row in done.values()])

    def share(row: dict[str, Any], key: str) -> str:
        return f"{row[key]:.1%}" if key in row else ""

    for name, row in sorted(rows.items(), key=lambda item: _order(item[1])):
        cells = ["", "", "", "", "", ""]
        remark = _short(row.get("error", ""))
        if name in done:
            base, speed = against[name], row["tokens_per_second_per_gpu"]
            efficiency = speed / done[base.name]["tokens_per_second_per_gpu"]
            row["efficiency"], row["efficiency_against"] = efficiency, base.name
            peak = f"{row['peak_memory'] / 2**30:.1f}" if "peak_memory" in row else ""
            seconds = sorted(row["seconds"])[len(row["seconds"]) // 2]
            cells = [
                f"{seconds:.3f}", f"{speed:,.0f}", f"{efficiency:.0%}", peak,
                share(row, "communication_share"), share(row, "exposed_communication_share"),
            ]  # fmt: skip
            remark = "" if base.ranks == 1 else f"against {base.place}"
        context = f"{row['context_length']:,}"
        table.add_row(row["model"], row["stage"], context, row["place"], str(row["ranks"]), *cells, remark)
    return table


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], STAGES.index(row["stage"]), row["context_length"], row["ranks"], row["place"]


def _stall(rows: Rows) -> Table:
    table = Table(
        "", "GPUs", "GB", "step s", "stall beside s", "whole save s", "training waits s", "", title="Saves"
    )
    for name, row in rows.items():
        if "error" in row:
            table.add_row(name, str(row["ranks"]), *[""] * 5, _short(row["error"]))
            continue
        for number, save in enumerate(row["beside_the_training"], start=1):
            table.add_row(
                f"{name}, save {number}", str(row["ranks"]), f"{row['bytes'] / 1e9:.1f}",
                f"{row['seconds_per_step']:.3f}", f"{save['stall']:.3f}", f"{save['whole']:.2f}",
                f"{row['training_waits']:.2f}", f"{save['steps_meanwhile']} steps meanwhile",
            )  # fmt: skip
    return table


def _faults(rows: Rows) -> Table:
    table = Table("", "", title="halo run in several processes")
    for name, row in rows.items():
        for key, value in row.items():
            if key != "work":
                table.add_row(name, f"{key.replace('_', ' ')}: {value}")
    return table
