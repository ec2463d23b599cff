"""HALO itself: recipes, stages, the trainer, layer selection, evaluation, reports and the `halo` command."""
