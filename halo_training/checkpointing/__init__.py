"""Training checkpoints: written beside the training, published as a whole, readable at any layout, without pickles."""

from halo_training.checkpointing.folder import TrainingCheckpoints
from halo_training.checkpointing.saver import BackgroundSaver

__all__ = ["BackgroundSaver", "TrainingCheckpoints"]
