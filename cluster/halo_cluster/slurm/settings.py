"""What a job asks Slurm for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

_FLAG = re.compile(r"[a-z][a-z-]*")
# Set by us; another value would break what keeps stages from running twice or from being lost.
_OURS = {
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
    """Everything but the number of nodes and `time_minutes` may be left to the site's defaults."""

    nodes: int = 1
    """Of training stages; the others run on one."""
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    memory_gb: float | None = None
    time_minutes: int = 240
    """After it the job saves, goes back into the queue and continues."""
    grace_seconds: int = 120
    """How long before its time limit a job is told to save."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    container: str | None = None
    """An image for `srun --container-image` (the pyxis plugin)."""
    sbatch: Mapping[str, str | int | bool] = field(default_factory=dict)
    """Further sbatch flags by their long names."""

    def check(self) -> None:
        """ValueError with the mend for what Slurm would read as something else, or that is not ours to give."""
        for flag in self.sbatch:
            if not _FLAG.fullmatch(flag):
                raise ValueError(f"sbatch flag {flag!r} is not a long name like 'mail-user'; correct it")
            if flag in _OURS:
                raise ValueError(f"sbatch flag {flag!r} is set by the executor; remove it")
        for name, value in {**asdict(self), **self.sbatch}.items():
            # A line of its own in a batch script would be a command.
            if isinstance(value, str) and not value.isprintable():
                raise ValueError(f"{name} has a line break or another control character in it; correct it")

    def submitit_parameters(self, nodes: int) -> dict[str, Any]:
        """As Submitit's SlurmExecutor names them; what is left to the site is absent."""
        parameters: dict[str, Any] = {
            "nodes": nodes,
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
