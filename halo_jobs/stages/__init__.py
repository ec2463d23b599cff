"""The stages of HALO: each a function from a StageContext to a StageResult, resumable, with its own recipe section."""
