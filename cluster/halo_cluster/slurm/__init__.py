"""Slurm: stages as jobs, submitted through Submitit and monitored in batches.

settings.py   what a job requests (partition, account, ...), from a recipe
queue.py      squeue, sacct, scancel, scontrol: one call for all jobs
submit.py     a stage's batch script
job.py        inside a job: which attempt and which node this is, and when the job is requeued
"""

from halo_cluster.slurm.settings import SlurmSettings
from halo_cluster.slurm.submit import Slurm

__all__ = ["Slurm", "SlurmSettings"]
