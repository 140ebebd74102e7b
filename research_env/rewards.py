r"""The papers' rewards, by name, and the metrics of an episode.

A reward is a function from a finished :class:`~research_env.episode.Episode` to a float. It reads
what the policy wrote and nothing that was retrieved. The authors' codes score one text in which
retrieved passages stand beside the policy's words, so a passage that says ``</answer>`` or
"assistant" costs a right answer its reward, and so does a search that finds nothing (R1-Searcher).
Here that text is rebuilt with one blank passage for every search (`blank_transcript`), and the
authors' definitions are applied to it: on a trajectory whose passages hold no such text the number
is theirs, and nothing that an engine returns can change it.

Three more differences are deliberate, and concern text that no clean trajectory holds. The authors
find the response by splitting prompt and response at "Assistant:" (or a chat marker), so a policy
that writes this marker moves the start of its own response; here the response is known. And the end
token, which they append as text, is no word here: an episode that was cut short has none. And an
answer that is opened in one action and closed in a later one is what the policy wrote in between,
without the results or the hint that stood there.

Each reward goes with the protocol of its paper; with another protocol's tags its format does not
hold. A void episode (the search engine failed) is never scored: the environment gives it 0.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import lru_cache

from research_env.episode import Episode
from research_env.errors import ConfigurationError, UnknownNameError
from research_env.metrics import (
    cover_exact_match,
    exact_match,
    f1,
    normalize_r1_searcher,
)
from research_env.protocol import Protocol, Tag
from research_env.retrieval.base import Hit, Passage
from research_env.shaping import SHAPING, Combination, Reward, Term, parse_sum, support_recall

_BLANK = Hit(Passage(id="", title="", text=""), score=0.0)
_CHINESE = re.compile("[\u4e00-\u9fff]")
_SEARCH_R1_TAG = re.compile(r"</?(?:think|search|information|answer)>")
_SEARCH_R1_HOP = ["<think>", "</think>", "<search>", "</search>", "<information>", "</information>"]
_SEARCH_R1_END = ["<think>", "</think>", "<answer>", "</answer>"]


def blank_transcript(episode: Episode) -> str:
    """The response from first to last action, as if each search had found one blank passage."""
    result = episode.protocol.render([_BLANK])
    parts: list[str] = []
    for turn in episode.turns:
        parts.append(turn.action)
        if turn.observation:  # else it is the last turn, or the search was refused
            parts.append(result if turn.kind == "search" else turn.observation)  # or the hint
    return "".join(parts)


# --- ReSearch ------------------------------------------------------------------------------------


def research(episode: Episode) -> float:
    r"""ReSearch's reward as the paper prints it: the default.

    ``r = F1(a_pred, a_gold)`` if that is not 0; else 0.1 if the format holds; else 0, where
    ``a_pred`` is the last ``\boxed{}`` of the answer and the best gold counts.

    Source: Chen et al. 2025, "ReSearch", the equation of the section "Reward Modeling". The
    authors' code looks at the format first: `research_strict`.
    """
    return _research_f1(episode) or 0.1 * research_format(episode)


def research_strict(episode: Episode) -> float:
    r"""ReSearch's reward as the authors' code computes it: 0 for every failure of the format.

    F1 of the boxed answer where the format holds, 0.1 where it holds and F1 is 0.

    Source: Agent-RL/ReCall, branch re-search, ``verl/utils/reward_score/re_search.py``.
    """
    return (_research_f1(episode) or 0.1) if research_format(episode) else 0.0


def research_format(episode: Episode) -> bool:
    r"""Whether a response has ReSearch's format.

    As many ``<think>`` as ``</think>``, at least one; one ``<answer>`` before one ``</answer>``
    with a ``\boxed{...}`` between them that can be read; after each ``<search>`` its ``</search>``,
    ``<result>`` and ``</result>`` in this order; and the episode ended by itself (the authors need
    the end token). Text outside the tags, also after the answer, is allowed.

    Odd cases, as in the authors' code: ``\boxed X`` (with a space) runs to the next ``$`` and wins
    over ``\boxed{X}``, but does not do without one; ``\fbox`` never counts; of nested boxes the
    innermost last one is read; a box that is never closed breaks the format.

    Source: ``validate_format`` and ``compute_score`` of the same file.
    """
    if episode.prediction is None or episode.truncated:
        return False
    text, rules = blank_transcript(episode), episode.protocol
    marks = _marks(rules.think, rules.query, rules.result, rules.answer).findall(text)
    # Where there is one answer, its last mark is its first, and sooner found.
    boxed = text[text.rfind(rules.answer.open) : text.rfind(rules.answer.close)]
    return (
        marks.count(rules.think.open) == marks.count(rules.think.close) > 0
        and marks.count(rules.answer.open) == marks.count(rules.answer.close) == 1
        and "\\boxed{" in boxed
        and "}" in boxed
        and _every_search_has_its_result(rules, marks)
    )


def _research_f1(episode: Episode) -> float:
    return f1(episode.prediction, episode.question.answers)


@lru_cache
def _marks(*tags: Tag) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(mark) for tag in tags for mark in tag))


def _every_search_has_its_result(rules: Protocol, marks: list[str]) -> bool:
    at = 0
    try:
        while rules.query.open in marks[at:]:
            search = marks.index(rules.query.open, at)
            asked = marks.index(rules.query.close, search)
            opened = marks.index(rules.result.open, search)
            at = marks.index(rules.result.close, opened)
            if opened < asked:
                return False
    except ValueError:  # one of them is missing
        return False
    return True


# --- R1-Searcher ---------------------------------------------------------------------------------


def r1_searcher_stage1(episode: Episode) -> float:
    """R1-Searcher's first stage: learn to retrieve, and the format.

    ``r = (1 if the answer covers the gold, else -1) + 0.5 [retrieved] + 0.5 [format]``. Covering is
    cover exact match with the first gold; no complete answer tag counts as not covering. Retrieved:
    at least one search, and every query mark has its documents. Format: no ``<think>`` (the prompt
    ends in it), one ``</think>``, one ``<answer>``, one ``</answer>``. The paper prints the two
    halves only; the first term is the authors' code.

    Source: RUCAIBox/R1-Searcher, ``train/reward_server_llama_stage1.py``.
    """
    text = blank_transcript(episode)
    covered = cover_exact_match(
        episode.prediction, episode.question.answers[:1], normalize_r1_searcher
    )
    retrieved = episode.protocol.query.open in text and _queries_match_documents(episode, text)
    return 2.0 * covered - 1.0 + 0.5 * retrieved + 0.5 * _one_thought_one_answer(episode, text)


def r1_searcher_stage2(episode: Episode) -> float:
    """R1-Searcher's second stage: F1 with the first gold, less 2 where the format is broken.

    ``r = F1(a_pred, a_gold) - 2 [not format]``, see `r1_searcher_format`. The normalisation is
    `metrics.normalize_r1_searcher`. For Llama see `r1_searcher_stage2_llama`.

    Source: RUCAIBox/R1-Searcher, ``train/reward_server_qwen_zero.py``.
    """
    score = f1(episode.prediction, episode.question.answers[:1], normalize_r1_searcher)
    return score - _r1_searcher_penalty(episode)


def r1_searcher_stage2_cem(episode: Episode) -> float:
    """`r1_searcher_stage2` with cover exact match in place of F1.

    Source: Song et al. 2025, "R1-Searcher", the study of rewards; ``cover_exact_match_score_1`` of
    ``train/reward_server_qwen_zero.py``.
    """
    score = cover_exact_match(
        episode.prediction, episode.question.answers[:1], normalize_r1_searcher
    )
    return score - _r1_searcher_penalty(episode)


def r1_searcher_stage2_em(episode: Episode) -> float:
    """`r1_searcher_stage2` with exact match in place of F1.

    Source: Song et al. 2025, "R1-Searcher", the study of rewards; ``exact_match_score`` of
    ``train/reward_server_qwen_zero.py``.
    """
    score = exact_match(episode.prediction, episode.question.answers[:1], normalize_r1_searcher)
    return score - _r1_searcher_penalty(episode)


def r1_searcher_stage2_llama(episode: Episode) -> float:
    """R1-Searcher's second stage for Llama: F1 with the first gold, less 1 for a broken format.

    Of the format (`r1_searcher_format`) only the tags are looked at, and Chinese characters.

    Source: RUCAIBox/R1-Searcher, ``train/reward_server_llama_stage2.py``.
    """
    text = blank_transcript(episode)
    well_formed = (
        _queries_match_documents(episode, text)
        and _one_thought_one_answer(episode, text)
        and not _CHINESE.search(_without_documents(episode, text))
    )
    score = f1(episode.prediction, episode.question.answers[:1], normalize_r1_searcher)
    return score - (0.0 if well_formed else 1.0)


def r1_searcher_format(episode: Episode) -> bool:
    """Whether a response has the format of R1-Searcher's second stage.

    Every query mark has its documents; no ``<think>`` (the prompt ends in it), one ``</think>``,
    one ``<answer>``, one ``</answer>``; no query or documents inside the answer, which has at most
    ten words; neither "assistant" nor "Assistant" anywhere; and no Chinese character but in
    documents. No search at all is allowed, text after the answer too, and so is an episode that was
    cut short: only the tags count.

    Source: ``MathRuleProxy.get_reward`` of ``train/reward_server_qwen_zero.py``. The authors look
    for "assistant" in retrieved documents as well: of the 625 trajectories of their model that they
    published, 23 lose 2 by that.
    """
    text, answer = blank_transcript(episode), episode.prediction or ""
    return (
        _queries_match_documents(episode, text)
        and _one_thought_one_answer(episode, text)
        and "assistant" not in text
        and "Assistant" not in text
        and "begin_of_query" not in answer
        and "begin_of_documents" not in answer
        and len(answer.split()) <= 10
        and (text.isascii() or not _CHINESE.search(_without_documents(episode, text)))
    )


def _r1_searcher_penalty(episode: Episode) -> float:
    return 0.0 if r1_searcher_format(episode) else 2.0


def _queries_match_documents(episode: Episode, text: str) -> bool:
    query, result = episode.protocol.query, episode.protocol.result
    marks = (
        query.open,
        query.close,
        result.open,
        result.close,
        f"{result.open}\n",
        f"{result.open}\n(1)",
        f"{result.close}\n\n",
    )
    return len({text.count(mark) for mark in marks}) == 1


def _one_thought_one_answer(episode: Episode, text: str) -> bool:
    think, answer = episode.protocol.think, episode.protocol.answer
    marks = (think.open, think.close, answer.open, answer.close)
    return [text.count(mark) for mark in marks] == [0, 1, 1, 1]


def _without_documents(episode: Episode, text: str) -> str:
    """The text less every span from an opening mark of documents to the next closing one."""
    result = episode.protocol.result
    kept, at = [], 0
    while (start := text.find(result.open, at)) >= 0:
        end = text.find(result.close, start)
        if end < 0:
            break
        kept.append(text[at:start])
        at = end + len(result.close)
    return "".join((*kept, text[at:]))


# --- Search-R1 -----------------------------------------------------------------------------------


def search_r1(episode: Episode) -> float:
    """Search-R1's reward: exact match of the last answer with any gold, 1 or 0.

    The authors take the last ``<answer>`` of prompt and response together and none where there is
    only one, for their prompt holds examples; so a response without an answer gives the "Beijing"
    of the prompt as its answer, or the "and" of the hint. Here the policy's words alone are read.

    Source: Jin et al. 2025, "Search-R1", ``verl/utils/reward_score/qa_em.py``.
    """
    return exact_match(episode.prediction, episode.question.answers)


def search_r1_format(episode: Episode) -> float:
    """Search-R1's reward with format: 1, or 0.8 / 0.2 / 0.1 / 0.

    A right answer: 1 with the format, else ``1 - structure`` = 0.8. A wrong one: ``structure`` =
    0.2 with the format, else ``final`` = 0.1. No answer: 0 (in the authors' pipeline it gets 0.1,
    for the example in the prompt is taken for it). Their reward for passages that hold the answer
    is 0 in their settings, so it is left out.

    Source: ``verl/utils/reward_score/qa_em_format.py`` with the settings of
    ``scripts/nq_hotpotqa/v0.3/train_grpo_format.sh`` (structure_format_score 0.2,
    final_format_score 0.1, retrieval_score 0).
    """
    well_formed = search_r1_format_holds(episode)
    if search_r1(episode):
        return 1.0 if well_formed else 0.8
    if well_formed:
        return 0.2
    return 0.0 if episode.prediction is None else 0.1


def search_r1_format_holds(episode: Episode) -> bool:
    """Whether a response is think, search, information, ..., think, answer, and only that.

    Nothing but white space may stand outside the tags, no tag inside another, every search is
    preceded by its own thought, and an action that got the hint breaks the format.

    Source: ``is_valid_sequence`` of ``verl/utils/reward_score/qa_em_format.py``.
    """
    text = blank_transcript(episode)
    tags = _SEARCH_R1_TAG.findall(text)
    hops = (len(tags) - len(_SEARCH_R1_END)) // len(_SEARCH_R1_HOP)
    outside = _SEARCH_R1_TAG.split(text)[::2]
    return tags == _SEARCH_R1_HOP * hops + _SEARCH_R1_END and not "".join(outside).strip()


# --- plain metrics, and the names ----------------------------------------------------------------


def f1_reward(episode: Episode) -> float:
    """F1 of the prediction with the best gold (`metrics.f1`); 0 without one."""
    return f1(episode.prediction, episode.question.answers)


def em_reward(episode: Episode) -> float:
    """Exact match of the prediction with any gold (`metrics.exact_match`); 0 without one."""
    return exact_match(episode.prediction, episode.question.answers)


def cem_reward(episode: Episode) -> float:
    """Cover exact match with any gold (`metrics.cover_exact_match`); 0 without a prediction."""
    return cover_exact_match(episode.prediction, episode.question.answers)


def format_reward(episode: Episode) -> float:
    """1 where the protocol's format holds, as its paper's reward defines it, else 0.

    For a protocol of one's own: where the episode ended with an answer.
    """
    holds = _FORMATS.get(episode.protocol.name)
    return float(holds(episode) if holds else episode.stop_reason == "answer")


_FORMATS: dict[str, Callable[[Episode], bool]] = {
    "research": research_format,
    "r1-searcher": r1_searcher_format,
    "search-r1": search_r1_format_holds,
}

REWARDS: dict[str, Reward] = {
    "research": research,
    "research-strict": research_strict,
    "r1-searcher-stage1": r1_searcher_stage1,
    "r1-searcher-stage2": r1_searcher_stage2,
    "r1-searcher-stage2-cem": r1_searcher_stage2_cem,
    "r1-searcher-stage2-em": r1_searcher_stage2_em,
    "r1-searcher-stage2-llama": r1_searcher_stage2_llama,
    "search-r1": search_r1,
    "search-r1-format": search_r1_format,
    "f1": f1_reward,
    "em": em_reward,
    "cem": cem_reward,
    "format": format_reward,
}
"""The rewards by name. A new one is a function here, or anywhere as "module:function"."""


def reward(name: str | Reward) -> Reward:
    """The reward of that name, or the sum of rewards.

    Args:
        name: one of `REWARDS` or of `shaping.SHAPING`; "module:function" for one of your own; a sum
            of them such as "research+0.1*support_recall-0.02*searches" (`shaping.parse_sum`); or
            the function itself.

    Raises:
        UnknownNameError: there is no reward of that name.
        ConfigurationError: the sum cannot be read, or "module:function" cannot be imported or
            called.
    """
    if callable(name):
        return name
    name, known = str(name), REWARDS | SHAPING
    if name in known:
        return known[name]
    if not set("+-* ").isdisjoint(name):
        return Combination(tuple(Term(w, each, reward(each)) for w, each in parse_sum(name, known)))
    module, colon, function = name.partition(":")
    if not colon:
        hint = "Name one of your own as 'module:function'."
        raise UnknownNameError("reward", name, known, hint)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"cannot import the reward {name!r}: {error}; "
            "write 'module:function' with a module that Python finds (see PYTHONPATH)"
        ) from error
    if not callable(found):
        raise ConfigurationError(f"the reward {name!r} is {found!r}, which is not a function")
    own: Reward = found
    return own


def episode_metrics(episode: Episode) -> dict[str, float]:
    """What is known of an episode at its end; always the same keys.

    Returns:
        ``em``, ``f1``, ``cem``: of the prediction, with SQuAD's normalisation and all golds.
        ``format``: `format_reward`.
        ``searches``: the number of searches.
        ``support_recall``: share of the gold passages that some search returned, by id; 0.0 where
        the question names none (`shaping.support_recall`).
    """
    return {
        "em": em_reward(episode),
        "f1": f1_reward(episode),
        "cem": cem_reward(episode),
        "format": format_reward(episode),
        "searches": float(episode.searches),
        "support_recall": support_recall(episode),
    }
