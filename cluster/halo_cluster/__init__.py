"""Runs stages somewhere and survives what happens to them. Knows nothing of models or of HALO.

A stage is a function that writes into its own folder. This room decides whether it still has to run, keeps
every attempt's log and end, and publishes the result once (record.py); holds a run against a second driver
(lock.py, run_folder.py); executes a plan in this process (local.py); and starts the processes of a stage that takes
several (ranks.py).
"""

from halo_cluster.attempts import AttemptState, AttemptStatus
from halo_cluster.local import PlannedStage, run_stages
from halo_cluster.processes import ProcessIdentity
from halo_cluster.ranks import THIS_MACHINE, Nodes, RankFailed, end_with_parent, rank_log, run_ranks
from halo_cluster.record import Attempt, StageRecord, input_hash
from halo_cluster.run_folder import RunFolder, StageStatus
from halo_cluster.storage import StorageError, storage_errors
from halo_cluster.trying import StageFailed, StageResult, StopRequested, carry_out

__all__ = [
    "THIS_MACHINE",
    "Attempt",
    "AttemptState",
    "AttemptStatus",
    "Nodes",
    "PlannedStage",
    "ProcessIdentity",
    "RankFailed",
    "RunFolder",
    "StageFailed",
    "StageRecord",
    "StageResult",
    "StageStatus",
    "StopRequested",
    "StorageError",
    "carry_out",
    "end_with_parent",
    "input_hash",
    "rank_log",
    "run_ranks",
    "run_stages",
    "storage_errors",
]
