"""What `multi_gpu.py` runs: rows, each one training in one layout, by the number of ranks that do them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

STAGES = ("align", "distill", "finetune")
PRECISIONS = ("fp32", "bf16")
CHECKED_STEPS, SAVED_STEP = 10, 5
TINY, SMALL = "tiny", "small"
LONG_CONTEXTS = (131_072, 524_288)

Layout = dict[str, Any]
"""Fields of hypenet_megatron's ParallelLayout."""

ONE: Layout = {}
_SHARDED: Layout = {"distributed_optimizer": True}
_OVERLAPPED: Layout = {"distributed_optimizer": True, "overlap": True}
_SEQUENCE: Layout = {"sequence_parallel": True}
CHECKED_LAYOUTS: dict[int, list[Layout]] = {
    2: [
        {"tensor": 2},
        {"tensor": 2, **_SEQUENCE},
        {"pipeline": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"context": 2},
        _SHARDED,
        _OVERLAPPED,
    ],
    4: [{"tensor": 2, "pipeline": 2}, {"tensor": 4}, {"context": 4}],
    8: [{"tensor": 2, "context": 2, **_SHARDED}],
}
_SAVED_IN: dict[int, Layout] = {
    1: ONE,
    2: {"tensor": 2},
    4: {"tensor": 2, "pipeline": 2},
    8: {"tensor": 2, "pipeline": 2, **_SHARDED},
}
_RESUMED_IN: dict[int, Layout] = {1: ONE, 2: {"context": 2}, 4: {"context": 2, **_SHARDED}}


@dataclass(frozen=True)
class Row:
    """One training in one layout. `work` says what is done with it: check, speed or stall.

    `steps` are untimed and timed ones of a speed row. `limit_seconds` is for the whole row, first compilations
    included. `continues` names a row that left a checkpoint, which this one goes on from.
    """

    name: str
    work: str
    ranks: int
    layout: Layout
    stage: str
    model: str
    precision: str
    context_length: int
    global_batch: int
    micro_batch: int
    steps: tuple[int, int] = (2, 5)
    limit_seconds: float = 150.0
    saves: bool = False
    continues: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Row:
        return cls(**{**content, "steps": tuple(content["steps"])})

    @property
    def tokens(self) -> int:
        """Per step, on all GPUs."""
        return self.context_length * self.global_batch

    @property
    def place(self) -> str:
        """The layout in the field's short words, such as "TP2+SP x DP4 + distributed optimizer"."""
        return layout_words(self.layout, self.ranks)


@dataclass
class WorldPlan:
    """Rows for one set of `ranks` processes. Those that are timed come after everything else."""

    name: str
    ranks: int
    rows: list[Row]
    timed: bool = False


def layout_words(layout: Layout, ranks: int) -> str:
    axes = [
        f"{word}{layout[key]}"
        for key, word in (
            ("tensor", "TP"),
            ("pipeline", "PP"),
            ("virtual_pipeline", "VPP"),
            ("context", "CP"),
        )
        if key in layout
    ]
    if layout.get("sequence_parallel"):
        axes[0] += "+SP"
    copies = ranks // (layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1))
    if copies > 1:
        axes.append(f"DP{copies}")
    words = " x ".join(axes) or "one GPU"
    words += " + distributed optimizer" if layout.get("distributed_optimizer") else ""
    words += " + overlap" if layout.get("overlap") else ""
    return words + (f" + recompute {layout['recompute']}" if "recompute" in layout else "")


def _check(layout: Layout, ranks: int, stage: str, precision: str, model: str, **more: Any) -> Row:
    context_length = {TINY: 32, SMALL: 256}[model]
    name = f"check {precision} {stage} {layout_words(layout, ranks)}"
    return Row(name, "check", ranks, layout, stage, model, precision, context_length, 8, 2, **more)


def baseline_name(row: Row) -> str:
    """The row on one GPU that a check is compared with."""
    return f"check {row.precision} {row.stage} {layout_words(ONE, 1)}"


def bound(row: Row) -> float:
    """Of the relative difference of any step's loss. A cross entropy is about 8 and those of the other stages are 0.5
    to 1, so that in bf16 it is a difference of 3e-3 to 8e-3 everywhere."""
    if row.precision == "fp32":
        return 1e-5
    return 1e-3 if row.stage == "finetune" else 5e-3


def correctness(gpus: int, model: str) -> list[WorldPlan]:
    """Every layout that fits against one GPU; a checkpoint of all GPUs, continued on half of them and on one."""

    def rows(ranks: int) -> list[Row]:
        return [
            _check(layout, ranks, stage, precision, model)
            for layout in CHECKED_LAYOUTS.get(ranks, [ONE])
            for precision in PRECISIONS
            for stage in STAGES
        ]

    plans = [WorldPlan("one GPU", 1, rows(1))]
    plans += [WorldPlan(f"{ranks} GPUs", ranks, rows(ranks)) for ranks in CHECKED_LAYOUTS if ranks <= gpus]
    return plans + (_resumes(gpus, model) if gpus > 1 else [])


def _resumes(gpus: int, model: str) -> list[WorldPlan]:
    saved = [
        replace(
            _check(_SAVED_IN[gpus], gpus, stage, precision, model, saves=True),
            name=f"save {precision} {stage} {layout_words(_SAVED_IN[gpus], gpus)}",
        )
        for precision in PRECISIONS
        for stage in ("distill", "finetune")
    ]
    plans = [WorldPlan("save", gpus, saved)]
    for ranks in sorted({gpus // 2, 1}, reverse=True):
        layout = _RESUMED_IN[ranks]
        resumed = [
            replace(
                row,
                name=f"resume {row.precision} {row.stage} {layout_words(layout, ranks)}",
                ranks=ranks,
                layout=layout,
                saves=False,
                continues=row.name,
            )
            for row in saved
        ]
        plans.append(WorldPlan(f"resume on {ranks}", ranks, resumed))
    return plans


# Tokens of a micro-batch and of a step per GPU; learning from windows of the published lengths.
_WINDOWS = {"align": 512, "distill": 512, "finetune": 16_384}
_MICRO_BATCH = {
    "hypenet-2b": {"align": 16, "distill": 16, "finetune": 1},
    "hypenet-9b": {"align": 8, "distill": 8, "finetune": 1},
}
_TOKENS_PER_GPU = {"hypenet-2b": 32_768, "hypenet-9b": 16_384}
_TIMED = {"hypenet-2b": (2, 5), "hypenet-9b": (1, 3)}


def speed_row(model: str, stage: str, layout: Layout, ranks: int, *, recompute: bool = True) -> Row:
    """bf16, random weights. Weak scaling: a step has as many tokens per GPU in every layout.

    Where tensor and context ranks share a micro-batch of short windows it has as many times more of them, so that each
    GPU's kernels are as long as alone; with a share of one GPU's micro-batch they are too short for the host to keep up
    (32 % efficiency of alignment in TP2+SP instead of 76 %, on H200). A window of finetuning is enough by itself.

    Finetuning recomputes layers: its windows of 16,384 tokens fit one GPU of 80 GB only so, and efficiency compares
    like with like.
    """
    if stage == "finetune" and recompute:
        layout = {**layout, "recompute": "layers"}
    if stage == "align":  # overlapped collectives start from a backward schedule, which alignment has not
        layout = {key: value for key, value in layout.items() if key != "overlap"}
    context_length, tokens = _WINDOWS[stage], _TOKENS_PER_GPU[model] * ranks
    sharing = 1 if stage == "finetune" else layout.get("tensor", 1) * layout.get("context", 1)
    name = f"speed {model} {stage} {layout_words(layout, ranks)}"
    return Row(
        name, "speed", ranks, layout, stage, model, "bf16", context_length, tokens // context_length,
        _MICRO_BATCH[model][stage] * sharing, _TIMED[model],
    )  # fmt: skip


def speed(gpus: int) -> list[WorldPlan]:
    def stages(model: str, layout: Layout, ranks: int) -> list[Row]:
        return [speed_row(model, stage, layout, ranks) for stage in STAGES]

    def world(ranks: int, rows: list[Row]) -> WorldPlan:
        return WorldPlan(f"{rows[0].place}, {rows[0].model}", ranks, rows, timed=True)

    two, nine = "hypenet-2b", "hypenet-9b"
    # What may run out of memory comes last: the processes of a failed row have to be started anew.
    plans = [world(1, [*stages(two, ONE, 1), speed_row(nine, "align", ONE, 1)])]
    if gpus >= 2:
        tensor = {"tensor": 2, **_SEQUENCE}
        plans += [
            world(2, stages(two, layout, 2))
            for layout in (_OVERLAPPED, {"pipeline": 2}, {"context": 2, **_SHARDED})
        ]
        nines = [speed_row(nine, stage, tensor, 2) for stage in ("align", "finetune")]
        plans.append(world(2, [*stages(two, tensor, 2), *nines]))
    if gpus >= 4:
        plans.append(world(4, stages(nine, {"tensor": 4, **_SEQUENCE}, 4)))
        plans.append(world(4, stages(two, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}, 4)))
    most = 8 if gpus >= 8 else 4 if gpus >= 4 else gpus
    stall = replace(
        speed_row(two, "finetune", _SHARDED if most > 1 else ONE, most),
        name=f"stall {two} on {most}",
        work="stall",
        limit_seconds=300.0,  # three saves of 27 GB
    )
    plans.append(WorldPlan("stall", most, [stall], timed=True))
    if gpus >= 8:
        rows = [
            *stages(two, _OVERLAPPED, 8),
            *stages(two, {"tensor": 2, **_SEQUENCE, **_OVERLAPPED}, 8),
            *stages(nine, {"tensor": 4, **_SEQUENCE, **_OVERLAPPED}, 8),
            speed_row(nine, "finetune", {"tensor": 2, **_SEQUENCE, **_OVERLAPPED}, 8),
            speed_row(two, "finetune", {"tensor": 2, "context": 2, **_SHARDED}, 8),
            speed_row(two, "finetune", _OVERLAPPED, 8, recompute=False),
        ]
        plans.append(world(8, rows))
    return plans


def speed_on_cpu(processes: int) -> list[WorldPlan]:
    """A few rows of the tiny shape, to try the script itself."""

    def row(work: str, stage: str, layout: Layout, ranks: int) -> Row:
        name = f"{work} {TINY} {stage} {layout_words(layout, ranks)}"
        return Row(name, work, ranks, layout, stage, TINY, "bf16", 64, 4 * ranks, 1, (1, 3))

    several = [row("speed", stage, _SHARDED, processes) for stage in STAGES]
    several.append(row("stall", "finetune", _SHARDED, processes))
    alone = [row("speed", stage, ONE, 1) for stage in STAGES]
    return [
        WorldPlan(f"{TINY}, {rows[0].ranks}", rows[0].ranks, rows, timed=True) for rows in (alone, several)
    ]


def long_contexts(gpus: int) -> list[WorldPlan]:
    """Finetuning steps of one long window, split over 1, 2, 4 and 8 GPUs; layers are recomputed everywhere."""
    plans = []
    for ranks in (ranks for ranks in (1, 2, 4, 8) if ranks <= gpus):
        layout: Layout = {"recompute": "layers"}
        if ranks > 1:
            layout |= {"context": ranks, **_SHARDED}
        rows = [
            Row(
                f"long {context_length:,} {layout_words(layout, ranks)}",
                "speed", ranks, layout, "finetune", "hypenet-2b", "bf16", context_length, 1, 1,
                (1, 3) if context_length == LONG_CONTEXTS[0] else (1, 1), 240.0,
            )
            for context_length in LONG_CONTEXTS
            # On two GPUs its residual stream alone would fill them; on one it shows what runs out.
            if not (context_length == LONG_CONTEXTS[1] and ranks == 2)
        ]  # fmt: skip
        plans.append(WorldPlan(f"long on {ranks}", ranks, rows, timed=True))
    return plans


def only(plans: Iterable[WorldPlan], pattern: str) -> list[WorldPlan]:
    """The rows whose name `pattern` is found in, and those that they go on from."""
    plans = list(plans)
    wanted = {row.name for plan in plans for row in plan.rows if re.search(pattern, row.name)}
    wanted |= {row.continues for plan in plans for row in plan.rows if row.continues and row.name in wanted}
    kept = [replace(plan, rows=[row for row in plan.rows if row.name in wanted]) for plan in plans]
    return [plan for plan in kept if plan.rows]


def baselines(rows: Sequence[Row]) -> dict[str, Row]:
    """For every speed row the one it is measured against: the same work on the fewest GPUs on which it was done."""
    found: dict[str, Row] = {}
    for row in rows:
        same = [
            other
            for other in rows
            if (other.model, other.stage, other.context_length) == (row.model, row.stage, row.context_length)
        ]
        found[row.name] = min(same, key=lambda other: other.ranks)
    return found
