"""What `halo reshard`, `export`, `verify` and `inspect` may be given: besides model folders, runs and checkpoints."""

from __future__ import annotations

from pathlib import Path

from halo_cluster.run_folder import RECIPE_FILE
from hypenet_tools.open_model import OpenedModel, open_model

CHECKPOINT_INDEX = "INDEX.json"  # of halo_training/checkpointing, which takes seconds to import


def is_training_checkpoint(folder: Path) -> bool:
    return (folder / CHECKPOINT_INDEX).is_file()


def weights_source(folder: Path) -> OpenedModel:
    """A model folder, or a training checkpoint without its optimizer. ValueError in one sentence otherwise."""
    if not is_training_checkpoint(folder):
        return open_model(folder)
    from halo_training.checkpoint_weights import open_checkpoint

    return open_checkpoint(folder)


def release_source(folder: Path) -> OpenedModel:
    """As `weights_source`, or a run's folder, which stands for what its export stage has published."""
    if not (folder / RECIPE_FILE).is_file():
        return weights_source(folder)
    published = sorted(folder.glob("export/*/DONE.json"), key=lambda path: path.stat().st_mtime)
    if not published:
        raise ValueError(
            f"{folder} has not come to its export; finish it with halo run, or name a checkpoint of it"
        )
    (config,) = published[-1].parent.glob("*/config.json")
    return open_model(config.parent)
