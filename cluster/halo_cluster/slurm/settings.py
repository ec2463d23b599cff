"""What a job requests of Slurm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import PositiveFloat, PositiveInt

_FLAG = re.compile(r"[a-z][a-z-]*")
# The executor sets these. Other values would let a stage run twice or get lost.
_RESERVED = {
    "dependency",
    "job-name",
    "kill-on-invalid-dep",
    "nodes",
    "ntasks-per-node",
    "open-mode",
    "requeue",
    "signal",
}


@dataclass(frozen=True)
class SlurmSettings:
    """None leaves a setting to the site's default."""

    nodes: PositiveInt = 1
    """Nodes of a training stage; the other stages run on one."""
    gpus_per_node: PositiveInt | None = None
    cpus_per_node: PositiveInt | None = None
    memory_gb: PositiveFloat | None = None
    time_minutes: PositiveInt = 240
    """The time limit. A job that reaches it saves, is requeued and continues."""
    grace_seconds: PositiveInt = 120
    """How long before its time limit a job is asked to save."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    container: str | None = None
    """An image for `srun --container-image` (the pyxis plugin)."""
    sbatch: Mapping[str, str | int | bool] = field(default_factory=dict)
    """Further sbatch flags by their long names."""

    def check(self) -> None:
        """ValueError, with the fix, for a value that Slurm would misread or a flag that the executor sets."""
        for flag in self.sbatch:
            if not _FLAG.fullmatch(flag):
                raise ValueError(f"sbatch flag {flag!r} is not a long name like 'mail-user'; correct it")
            if flag in _RESERVED:
                raise ValueError(f"sbatch flag {flag!r} is set by the executor; remove it")
        for name, value in {**asdict(self), **self.sbatch}.items():
            # In a batch script a second line would be a command.
            if isinstance(value, str) and not value.isprintable():
                raise ValueError(f"{name} contains a line break or another control character; correct it")

    def submitit_parameters(self) -> dict[str, Any]:
        """Parameters of Submitit's SlurmExecutor; those left to the site are absent."""
        parameters: dict[str, Any] = {
            "ntasks_per_node": 1,
            "time": self.time_minutes,
            "signal_delay_s": self.grace_seconds,
            "gpus_per_node": self.gpus_per_node,
            "cpus_per_task": self.cpus_per_node,
            "mem": None if self.memory_gb is None else f"{round(self.memory_gb * 1024)}M",
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
        }
        return {key: value for key, value in parameters.items() if value is not None}
