"""Names of the files that hold the progress of a stage. In a module that `halo status` imports without torch."""

METRICS_FILE = "metrics.jsonl"
PROGRESS_FILE = "progress.json"
