"""The type of a paper, and what the papers' rewards share.

A reward is a function from a finished :class:`~research_env.episode.Episode` to a float. It reads
what the policy wrote and nothing that was retrieved. The authors' code scores one text that holds
the policy's words and the passages. So a passage that says ``</answer>`` or "assistant" costs a
right answer its reward, and so does a search that finds nothing (R1-Searcher). Here that text is
rebuilt with one blank passage per search (`blank_transcript`), and the authors' definitions are
applied to it: the reward equals theirs if no passage holds such text, and nothing that an engine
returns changes it.

Three more differences are deliberate, and concern text that no clean trajectory holds:

- The authors split prompt and response at "Assistant:" (or a chat marker), so a policy that writes
  this marker moves the start of its own response. Here the response is known.
- The authors append the end token as text. Here it is not part of the text: whether the episode
  was cut short is known.
- An answer that is opened in one action and closed in a later one is what the policy wrote in
  between, without the results or the hint that stood there.

Each reward goes with the protocol of its paper; with another protocol's tags its format does not
hold. A void episode (the search engine failed) is never scored: the environment gives it 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import TypeVar

from research_env.episode import Episode
from research_env.metrics import exact_match, f1
from research_env.protocol import Protocol
from research_env.retrieval.base import Hit, Passage

Reward = Callable[[Episode], float]
Value = TypeVar("Value", bool, float, str)

_BLANK = Hit(Passage(id="", title="", text=""), score=0.0)


@dataclass(frozen=True, slots=True)
class Paper:
    """A paper's rules and rewards.

    Attributes:
        protocol: its tags, parser, prompts and limits.
        rewards: its rewards by name.
        follows_format: whether a finished episode has the format that these rewards ask for.
    """

    protocol: Protocol
    rewards: Mapping[str, Reward]
    follows_format: Callable[[Episode], bool]


def once_per_episode(function: Callable[[Episode], Value]) -> Callable[[Episode], Value]:
    """Decorate a function of an episode, so that rewards and metrics share one computation."""
    name = f"{function.__module__}.{function.__qualname__}"

    @wraps(function)
    def value(episode: Episode) -> Value:
        if name not in episode.memo:
            episode.memo[name] = function(episode)
        found: Value = episode.memo[name]
        return found

    return value


@once_per_episode
def blank_transcript(episode: Episode) -> str:
    """The response from first to last action, as if each search had found one blank passage.

    Some chat templates open `think` in the prompt (DeepSeek-R1's distilled models, Qwen3.5). The
    environment does not see the rendered prompt, so after a chat a response that closes a thought
    before it opens one is read as the rest of a thought that the prompt opened.
    """
    result = episode.protocol.render([_BLANK])
    parts: list[str] = []
    for turn in episode.turns:
        parts.append(turn.action)
        if turn.observation:  # empty: the turn is the last, or its search was refused
            # The observation of another turn than a search is the hint.
            parts.append(result if turn.kind == "search" else turn.observation)
    text = "".join(parts)
    if episode.chat:
        think = episode.protocol.think
        before, closed, _ = text.partition(think.close)
        if closed and think.open not in before:
            return think.open + text
    return text


@once_per_episode
def f1_reward(episode: Episode) -> float:
    """F1 of the prediction with the best gold (`metrics.f1`); 0 without one."""
    return f1(episode.prediction, episode.question.answers, language=episode.metric_language)


@once_per_episode
def em_reward(episode: Episode) -> float:
    """Exact match of the prediction with any gold (`metrics.exact_match`); 0 without one."""
    answers, language = episode.question.answers, episode.metric_language
    return exact_match(episode.prediction, answers, language=language)
