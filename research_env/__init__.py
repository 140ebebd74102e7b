"""A Gymnasium environment in which language models answer questions with a search engine.

Example:
    >>> import gymnasium as gym
    >>> import research_env  # registers the ids
    >>> env = gym.make("ReSearch-MiniWorld-v0", split="train")
    >>> observation, info = env.reset(seed=7)
"""

from research_env.datasets.base import Corpus, Dataset, Hop, Question
from research_env.episode import Episode, Turn, advance, fail, observe, truncate
from research_env.errors import ResearchEnvError
from research_env.footprint import footprint
from research_env.markup import Tag
from research_env.papers.r1_searcher import R1_SEARCHER
from research_env.papers.research import RESEARCH
from research_env.papers.search_r1 import SEARCH_R1
from research_env.protocol import Protocol
from research_env.registration import IDS, register_envs
from research_env.retrieval.base import Hit, Passage, Retriever
from research_env.spaces import UnicodeText

__all__ = [
    "IDS",
    "R1_SEARCHER",
    "RESEARCH",
    "SEARCH_R1",
    "Corpus",
    "Dataset",
    "Episode",
    "Hit",
    "Hop",
    "Passage",
    "Protocol",
    "Question",
    "ResearchEnvError",
    "Retriever",
    "Tag",
    "Turn",
    "UnicodeText",
    "advance",
    "fail",
    "footprint",
    "observe",
    "truncate",
]

register_envs()
