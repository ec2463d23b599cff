"""Generated recall episodes for training mixtures: needles, key-value lists and span copies."""

from halo_evaluation.recall.episodes import EpisodeGenerator
from halo_evaluation.recall.materials import Materials
from halo_evaluation.recall.store import write_recall_store
from halo_evaluation.recall.words import WordSplit, load_words

__all__ = ["EpisodeGenerator", "Materials", "WordSplit", "load_words", "write_recall_store"]
