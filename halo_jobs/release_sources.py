"""What `halo reshard`, `export`, `verify` and `inspect` may be given: besides model folders, runs and checkpoints."""

from __future__ import annotations

from pathlib import Path

from halo_cluster.run_folder import RECIPE_FILE, RunFolder
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


def model_folder(folder: Path) -> Path:
    """The folder that a run's export stage has published, or `folder` itself if it is not a run."""
    if not (folder / RECIPE_FILE).is_file():
        return folder
    exports = [record for record in RunFolder(folder).planned() if record.stage == "export"]
    if not exports or exports[0].done() is None:
        raise ValueError(f"{folder} has not exported its model yet; finish it with `halo run`")
    (config,) = exports[0].folder.glob("*/config.json")
    return config.parent


def release_source(folder: Path) -> OpenedModel:
    """As `weights_source`; a run's folder stands for what its export stage has published."""
    return weights_source(model_folder(folder))
