"""What the workers of test_fan_out.py do, and a driver to be killed.

python -m tests.support.fan_out_work '<JSON: folder, count, backend, options, setup>'
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from halo_cluster import fan_out as fo

WORKER = "tests.support.fan_out_work:make_worker"


def make_worker(setup: dict[str, Any]) -> Any:
    """`setup`: "notes", a folder that every execution leaves a file in."""
    if "refuse" in setup:
        raise ValueError(setup["refuse"])
    notes = Path(setup["notes"])
    notes.mkdir(exist_ok=True)

    def work(arguments: dict[str, Any]) -> Any:
        """Square "value" after "seconds". With "hold", not before a file of that name exists; a file "die-<value>"
        kills the process that works on it. The first "failures" times raise; "refuse" is a user's error."""
        value = arguments["value"]
        earlier = executions(notes)[value]
        (notes / f"{value}.{uuid.uuid4().hex}").touch()
        if earlier < arguments.get("failures", 0):
            raise RuntimeError(f"no luck with {value}")
        if "refuse" in arguments:
            raise ValueError(arguments["refuse"])
        while "hold" in arguments and not (notes / arguments["hold"]).exists():
            if earlier == 0 and (notes / f"die-{value}").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.02)
        time.sleep(arguments.get("seconds", 0.0))
        return {"square": value * value, "third": value / 3}

    return work


def executions(notes: Path) -> Counter[int]:
    """How often the task of each value was begun."""
    return Counter(int(path.name.partition(".")[0]) for path in notes.glob("*.*"))


def plan_of(notes: Path, count: int, **arguments: Any) -> fo.Plan:
    """Tasks "task-0" and so on, all with the same further arguments."""
    tasks = tuple(fo.Task(f"task-{value}", {"value": value, **arguments}) for value in range(count))
    return fo.Plan(WORKER, {"notes": str(notes)}, tasks)


if __name__ == "__main__":
    wish = json.loads(sys.argv[1])
    plan = plan_of(Path(wish["notes"]), wish["count"], **wish["arguments"])
    backend = getattr(fo, wish["backend"])(**wish["options"])
    print(json.dumps(fo.fan_out(Path(wish["folder"]), plan, backend, name="tiny select")))
