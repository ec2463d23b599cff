"""Training checkpoints: written beside the training, published whole, readable at any layout, free of pickles."""

from halo_training.checkpointing.folder import TrainingCheckpoints
from halo_training.checkpointing.saver import BackgroundSaver
from halo_training.checkpointing.state import KeyFilter

__all__ = ["BackgroundSaver", "KeyFilter", "TrainingCheckpoints"]
