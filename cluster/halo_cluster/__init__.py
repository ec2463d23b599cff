"""Runs stages somewhere, and survives what happens to them. It knows nothing of models or of HALO.

A stage is a function that writes into its own folder. This package decides whether it still has to run, keeps the log
and the end of every attempt (attempts.py), and publishes the result once (record.py). It refuses a second driver for a
run folder (run_folder.py), executes a plan in this process (local.py) or as jobs (reconcile.py, slurm/),
starts the ranks of a stage that takes several processes (ranks.py), and spreads tasks over workers (fan_out/). Only
children.py and signals.py handle child processes and signals.
"""

from halo_cluster.attempts import AttemptState, AttemptStatus, ExitReport
from halo_cluster.children import end_with_parent
from halo_cluster.execution import StageFailed, StageResult, StopRequested, execute_attempt
from halo_cluster.local import PlannedStage, run_stages
from halo_cluster.ranks import THIS_MACHINE, Nodes, RankFailed, rank_log, run_ranks
from halo_cluster.record import Attempt, StageRecord, input_hash
from halo_cluster.run_folder import RunFolder, StageStatus
from halo_cluster.storage import StorageError, storage_errors

__all__ = [
    "THIS_MACHINE",
    "Attempt",
    "AttemptState",
    "AttemptStatus",
    "ExitReport",
    "Nodes",
    "PlannedStage",
    "RankFailed",
    "RunFolder",
    "StageFailed",
    "StageRecord",
    "StageResult",
    "StageStatus",
    "StopRequested",
    "StorageError",
    "end_with_parent",
    "execute_attempt",
    "input_hash",
    "rank_log",
    "run_ranks",
    "run_stages",
    "storage_errors",
]
