"""What a paper consists of, and what the papers' rewards share.

A reward is a function from a finished :class:`~research_env.episode.Episode` to a float. It reads
what the policy wrote and nothing that was retrieved. The authors' code scores one text in which
retrieved passages stand beside the policy's words, so a passage that says ``</answer>`` or
"assistant" costs a right answer its reward, and so does a search that finds nothing (R1-Searcher).
Here that text is rebuilt with one blank passage for every search (`blank_transcript`), and the
authors' definitions are applied to it: on a trajectory whose passages hold no such text the number
is theirs, and nothing that an engine returns can change it.

Three more differences are deliberate, and concern text that no clean trajectory holds. The authors
find the response by splitting prompt and response at "Assistant:" (or a chat marker), so a policy
that writes this marker moves the start of its own response; here the response is known. The end
token, which they append as text, is no word here: an episode that was cut short has none. An answer
that is opened in one action and closed in a later one is what the policy wrote in between, without
the results or the hint that stood there.

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
    """Compute a value of an episode once, however many rewards and metrics ask for it."""
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
        if turn.observation:  # else it is the last turn, or the search was refused
            parts.append(result if turn.kind == "search" else turn.observation)  # or the hint
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
