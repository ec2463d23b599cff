"""Slurm: stages as jobs, submitted through Submitit, looked after in batches.

settings.py   what a site wants to be told (partition, account, ...), from a recipe
queue.py      squeue, sacct, scancel, scontrol: one call for all jobs
submit.py     a stage's batch script
launcher.py   what runs on every node of a job
"""

from halo_cluster.slurm.settings import SlurmSettings
from halo_cluster.slurm.submit import Slurm

__all__ = ["Slurm", "SlurmSettings"]
