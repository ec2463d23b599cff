"""What `halo export` accepts: any model on disk, or the folder of a finished run."""

from __future__ import annotations

from pathlib import Path

from halo_cluster.run_folder import RECIPE_FILE, RunFolder
from hypenet_tools.open_model import OpenedModel, open_model


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
    """Open any model on disk; a run's folder stands for what its export stage has published."""
    return open_model(model_folder(folder))
