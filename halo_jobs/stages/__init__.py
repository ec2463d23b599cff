"""The stages of a run. Each is a resumable function from a StageContext to a StageResult."""
