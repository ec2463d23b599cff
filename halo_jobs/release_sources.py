"""What `halo reshard`, `export`, `verify` and `inspect` may be given: besides model folders, runs and checkpoints."""

from __future__ import annotations

from pathlib import Path

from halo_cluster.run_folder import RECIPE_FILE
from hypenet_tools.opened import OpenedModel, open_model

CHECKPOINT_INDEX = "INDEX.json"  # of halo_jobs/checkpointing, which takes seconds to import


def weights_source(folder: Path, *, weights_only: bool) -> OpenedModel:
    """A model folder, or a training checkpoint without its optimizer. ValueError in one sentence otherwise."""
    if not (folder / CHECKPOINT_INDEX).is_file():
        return open_model(folder)
    if not weights_only:
        raise ValueError(
            f"{folder} is a training checkpoint, which resumes at any layout as it is; add --weights-only for a "
            "weights folder without the optimizer"
        )
    from halo_jobs.checkpoint_weights import open_checkpoint

    return open_checkpoint(folder)


def release_source(folder: Path) -> OpenedModel:
    """As `weights_source`, or a run's folder, which stands for what its export stage has published."""
    if not (folder / RECIPE_FILE).is_file():
        return weights_source(folder, weights_only=True)
    published = sorted(folder.glob("export/*/DONE.json"), key=lambda path: path.stat().st_mtime)
    if not published:
        raise ValueError(
            f"{folder} has not come to its export; finish it with halo run, or name a checkpoint of it"
        )
    (config,) = published[-1].parent.glob("*/config.json")
    return open_model(config.parent)
