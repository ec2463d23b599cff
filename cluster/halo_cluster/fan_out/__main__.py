"""The processes that backends start: python -m halo_cluster.fan_out ROLE ARGUMENT..."""

from __future__ import annotations

import sys
from collections.abc import Callable

from halo_cluster.fan_out import ray_actors, ray_cluster, slurm_array, worker

_ROLES: dict[str, Callable[..., int | None]] = {
    "worker": worker.main,
    "array-element": slurm_array.main,
    "ray-driver": ray_actors.main,
    "ray-node": ray_cluster.main,
}

if __name__ == "__main__":
    sys.exit(_ROLES[sys.argv[1]](*sys.argv[2:]))
