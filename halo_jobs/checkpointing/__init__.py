"""Training checkpoints: written beside the training, published whole, readable at any layout, free of pickles."""

from halo_jobs.checkpointing.folder import TrainingCheckpoints
from halo_jobs.checkpointing.saver import BackgroundSaver
from halo_jobs.checkpointing.state import KeyFilter

__all__ = ["BackgroundSaver", "KeyFilter", "TrainingCheckpoints"]
