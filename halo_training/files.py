"""File names that say how far a stage is. Kept apart so that `halo status` imports them without torch."""

METRICS_FILE = "metrics.jsonl"
PROGRESS_FILE = "progress.json"
