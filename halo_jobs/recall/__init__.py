"""Generated recall episodes for training mixtures: needles, key-value lists and span copies, token by token."""

from halo_jobs.recall.episodes import EpisodeGenerator
from halo_jobs.recall.materials import Materials
from halo_jobs.recall.store import write_recall_store
from halo_jobs.recall.words import WordSplit, load_words

__all__ = ["EpisodeGenerator", "Materials", "WordSplit", "load_words", "write_recall_store"]
