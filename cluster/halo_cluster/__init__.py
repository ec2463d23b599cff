"""Runs stages somewhere and survives what happens to them. Knows nothing of models or of HALO.

A stage is a function that writes into its own folder. This room decides whether it still has to run, keeps
every attempt's log and end, and publishes the result once (record.py); holds a run against a second driver
(lock.py, run_folder.py); and executes a plan in this process (local.py).
"""

from halo_cluster.attempts import AttemptState, AttemptStatus
from halo_cluster.local import PlannedStage, StageFailed, StageResult, StopRequested, run_stages
from halo_cluster.processes import ProcessIdentity
from halo_cluster.record import Attempt, StageRecord, input_hash
from halo_cluster.run_folder import RunFolder, StageStatus
from halo_cluster.storage import StorageError, storage_errors

__all__ = [
    "Attempt",
    "AttemptState",
    "AttemptStatus",
    "PlannedStage",
    "ProcessIdentity",
    "RunFolder",
    "StageFailed",
    "StageRecord",
    "StageResult",
    "StageStatus",
    "StopRequested",
    "StorageError",
    "input_hash",
    "run_stages",
    "storage_errors",
]
