"""Training checkpoints: written in the background, published atomically, readable at any layout, free of pickles."""

from halo_training.checkpointing.folder import TrainingCheckpoints
from halo_training.checkpointing.saver import BackgroundSaver

__all__ = ["BackgroundSaver", "TrainingCheckpoints"]
