"""Spreads independent tasks over workers: local processes, Slurm job arrays, Ray actors.

A task is a name and JSON arguments. The function that does it is named by an import path "module:function", so nothing
is pickled: `make_worker(setup)` loads what is expensive once and returns the function that maps arguments to a JSON
result. Workers take one task after another from a shared folder (task_pool.py), where each result is published once.
The backends (worker_pools.py, slurm_array.py, ray_actors.py) only start workers and replace lost ones.
"""

from halo_cluster.fan_out.driver import fan_out
from halo_cluster.fan_out.plan import Plan, Task
from halo_cluster.fan_out.ray_actors import RayActors
from halo_cluster.fan_out.slurm_array import SlurmArray
from halo_cluster.fan_out.task_pool import FanOutFailed
from halo_cluster.fan_out.worker_pools import Backend, LocalProcesses, ThisProcess

__all__ = [
    "Backend",
    "FanOutFailed",
    "LocalProcesses",
    "Plan",
    "RayActors",
    "SlurmArray",
    "Task",
    "ThisProcess",
    "fan_out",
]
