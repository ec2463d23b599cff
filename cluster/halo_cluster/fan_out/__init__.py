"""Many independent tasks over many workers, each task's result published once: local processes, Slurm arrays, Ray.

A task is a name and JSON arguments. What runs it is named by an import path "module:function", so nothing of the
caller's is pickled: `make_worker(setup)` loads what is expensive once and returns the function that maps arguments to a
JSON result. Workers pull one task after another out of a shared folder (task_pool.py); the backends (crews.py,
slurm_array.py, ray_actors.py) only start workers and put others in the place of lost ones.
"""

from halo_cluster.fan_out.crews import Backend, Crew, Launch, LocalProcesses, ThisProcess
from halo_cluster.fan_out.driver import fan_out
from halo_cluster.fan_out.plan import MakeWorker, Plan, Task
from halo_cluster.fan_out.ray_actors import RayActors
from halo_cluster.fan_out.task_pool import FanOutFailed

__all__ = [
    "Backend",
    "Crew",
    "FanOutFailed",
    "Launch",
    "LocalProcesses",
    "MakeWorker",
    "Plan",
    "RayActors",
    "Task",
    "ThisProcess",
    "fan_out",
]
