"""Tables of multi_gpu.json: a line for each row, failures included."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from multi_gpu_plan import Row, baselines
from rich.table import Table

Rows = dict[str, dict[str, Any]]


def tables(content: dict[str, Any]) -> Iterator[Table]:
    rows: Rows = content["rows"]
    _add_efficiency({name: row for name, row in rows.items() if row["work"] == "speed" and "error" not in row})
    for work, title, columns in (
        ("check", "Losses against one GPU; resumed: against the run that saved", _CHECK),
        ("speed", "Speed; efficiency against the fewest GPUs that did the same work", _SPEED),
        ("stall", "Saves beside the training and while it waits", _STALL),
    ):
        found = {name: row for name, row in rows.items() if row["work"] == work}
        if found:
            table = Table("", *columns, "", title=title)
            for name, row in found.items():
                cells = ["" if "error" in row else show(row) for show in columns.values()]
                table.add_row(name, *cells, row.get("error", row.get("verdict", ""))[:150])
            yield table
    faults = {name: row for name, row in rows.items() if row["work"] == "faults"}
    if faults:
        table = Table("", "", title="halo run in several processes")
        for name, row in faults.items():
            for key, value in row.items():
                table.add_row(name, f"{key.replace('_', ' ')}: {value}")
        yield table


def _add_efficiency(done: Rows) -> None:
    fields = Row.__dataclass_fields__
    against = baselines([Row.from_json({key: row[key] for key in fields}) for row in done.values()])
    for name, row in done.items():
        base = done[against[name].name]
        row["efficiency"] = row["tokens_per_second_per_gpu"] / base["tokens_per_second_per_gpu"]
        row["efficiency_against"] = against[name].name


def _share(key: str) -> Any:
    return lambda row: f"{row[key]:.1%}" if key in row else ""


_CHECK = {
    "largest difference": lambda row: f"{row['largest_difference']:.1e}" if "largest_difference" in row else "",
    "bound": lambda row: f"{row['bound']:.0e}" if "bound" in row else "",
}
_SPEED = {
    "s/step": lambda row: f"{median(row['seconds']):.3f}",
    "tokens/s/GPU": lambda row: f"{row['tokens_per_second_per_gpu']:,.0f}",
    "efficiency": _share("efficiency"),
    "peak GiB": lambda row: f"{row['peak_memory'] / 2**30:.1f}" if "peak_memory" in row else "",
    "communication": _share("communication_share"),
    "exposed": _share("exposed_communication_share"),
}
_STALL = {
    "GB": lambda row: f"{row['bytes'] / 1e9:.1f}",
    "s/step": lambda row: f"{row['seconds_per_step']:.3f}",
    "stall s": lambda row: ", ".join(f"{save['stall']:.3f}" for save in row["beside_the_training"]),
    "whole save s": lambda row: ", ".join(f"{save['whole']:.2f}" for save in row["beside_the_training"]),
    "training waits s": lambda row: f"{row['training_waits']:.2f}",
}
