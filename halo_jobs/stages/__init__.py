"""The stages of HALO. Each is a resumable function from a StageContext to a StageResult."""
