"""Questions and the corpora that answer them, by name."""

from research_env.datasets.base import Corpus, Dataset, Hop, Question
from research_env.datasets.files import FileCorpus, read_questions
from research_env.datasets.load import DATASETS, load_dataset

__all__ = [
    "DATASETS",
    "Corpus",
    "Dataset",
    "FileCorpus",
    "Hop",
    "Question",
    "load_dataset",
    "read_questions",
]
