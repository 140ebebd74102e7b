r"""ReSearch (Chen et al. 2025): tags, parser, prompts and rewards.

References:
    "ReSearch: Learning to Reason with Search for LLMs via Reinforcement Learning"
    (arXiv:2503.19470); the code of Agent-RL/ReCall, branch re-search: the vLLM rollout with search,
    ``verl/utils/dataset/template.py`` (the prompts, word for word) and
    ``verl/utils/reward_score/re_search.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from research_env.episode import Episode
from research_env.markup import Tag, between, defuse, last_before_end
from research_env.papers.base import Paper, blank_transcript, f1_reward, once_per_episode
from research_env.protocol import Parsed, Protocol, answer_or_invalid
from research_env.retrieval.base import Hit

_BASE = (
    "A conversation between User and Assistant. "
    "The user asks a question, and the assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. "
    "During thinking, the assistant can invoke the wikipedia search tool to search for fact "
    "information about specific topics if needed. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags respectively, "
    "and the search query and result are enclosed within <search> </search> and <result> </result> "
    "tags respectively. "
    "For example, <think> This is the reasoning process. </think> <search> search query here "
    "</search> <result> search result here </result> "
    "<think> This is the reasoning process. </think> <answer> The final answer is "
    "\\[ \\boxed{answer here} \\] </answer>. "
    "In the last part of the answer, the final exact answer is enclosed within \\boxed{} with "
    "latex format. "
    "User: {question}. Assistant:"
)

_SYSTEM = (
    "You are a helpful assistant that can solve the given question step by step with the help of "
    "the wikipedia search tool. "
    "Given a question, you need to first think about the reasoning process in the mind and then "
    "provide the answer. "
    "During thinking, you can invoke the wikipedia search tool to search for fact information "
    "about specific topics if needed. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags respectively, "
    "and the search query and result are enclosed within <search> </search> and <result> </result> "
    "tags respectively. "
    "For example, <think> This is the reasoning process. </think> <search> search query here "
    "</search> <result> search result here </result> "
    "<think> This is the reasoning process. </think> <answer> The final answer is "
    "\\[ \\boxed{answer here} \\] </answer>. "
    "In the last part of the answer, the final exact answer is enclosed within \\boxed{} with "
    "latex format."
)


def _parse_research(protocol: Protocol, text: str) -> Parsed:
    """The query from the last opening mark; without a mark the query is empty."""
    tag = protocol.query
    if text.endswith(tag.close):
        return Parsed("search", last_before_end(text, tag) or "")
    return answer_or_invalid(protocol, text)


def _render_research(protocol: Protocol, hits: Sequence[Hit]) -> str:
    """Passages as FlashRAG's Wikipedia holds them: the title in quotes, a line feed, the text."""
    passages = [
        f'"{defuse(hit.passage.title)}"\n{defuse(hit.passage.text)}'
        if hit.passage.title
        else defuse(hit.passage.text)
        for hit in hits
    ]
    text = "\n\n".join(passages).strip()
    return f" {protocol.result.open}\n{text}\n{protocol.result.close}"


def _extract_boxed(protocol: Protocol, response: str) -> str | None:
    r"""The last ``\boxed{...}`` of the first answer, odd cases as in the authors' reward."""
    answer = between(response, protocol.answer)
    return None if answer is None else last_boxed(answer)


def last_boxed(answer: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` of a text, or None."""
    if "\\boxed " in answer:
        return answer.rsplit("\\boxed ", 1)[1].split("$", 1)[0]
    start = answer.rfind("\\boxed")
    if start < 0 or not answer.startswith("\\boxed{", start):
        return None
    inside, closed, _ = answer[start + len("\\boxed{") :].partition("}")
    if closed and "{" not in inside:
        return inside
    depth = 0
    for at in range(start, len(answer)):
        if answer[at] == "{":
            depth += 1
        elif answer[at] == "}":
            depth -= 1
            if depth == 0:
                return answer[start + len("\\boxed{") : at]
    return None


RESEARCH = Protocol(
    name="research",
    think=Tag("<think>", "</think>"),
    query=Tag("<search>", "</search>"),
    result=Tag("<result>", "</result>"),
    answer=Tag("<answer>", "</answer>"),
    terminators=("</search>",),
    parser=_parse_research,
    renderer=_render_research,
    extractor=_extract_boxed,
    prompts={
        "base": (("user", _BASE),),
        "instruct": (("system", _SYSTEM), ("user", "{question}")),
    },
    top_k=5,
    reward="research",
)


def research(episode: Episode) -> float:
    r"""ReSearch's reward as the paper prints it: the default.

    ``r = F1(a_pred, a_gold)`` if that is not 0; else 0.1 if the format holds; else 0, where
    ``a_pred`` is the last ``\boxed{}`` of the answer and the best gold counts.

    Source: Chen et al. 2025, "ReSearch", the equation of the section "Reward Modeling". The
    authors' code looks at the format first: `research_strict`.
    """
    return f1_reward(episode) or 0.1 * research_format(episode)


def research_strict(episode: Episode) -> float:
    r"""ReSearch's reward as the authors' code computes it: 0 for every failure of the format.

    F1 of the boxed answer where the format holds, 0.1 where it holds and F1 is 0.

    Source: Agent-RL/ReCall, branch re-search, ``verl/utils/reward_score/re_search.py``.
    """
    return (f1_reward(episode) or 0.1) if research_format(episode) else 0.0


@once_per_episode
def research_format(episode: Episode) -> bool:
    r"""Whether a response has ReSearch's format.

    As many ``<think>`` as ``</think>``, at least one; one ``<answer>`` before one ``</answer>``
    with a ``\boxed{...}`` between them that can be read; after each ``<search>`` its ``</search>``,
    ``<result>`` and ``</result>`` in this order; and the episode ended by itself (the authors need
    the end token). Text outside the tags, also after the answer, is allowed.

    Odd cases, as in the authors' code: ``\boxed X`` (with a space) runs to the next ``$`` and is
    read instead of a ``\boxed{X}``, but the format still needs a ``\boxed{`` and a ``}``; ``\fbox``
    never counts; of nested boxes the last one, which is the innermost, is read; a box that is never
    closed breaks the format.

    Source: ``validate_format`` and ``compute_score`` of the same file.
    """
    if episode.prediction is None or episode.truncated:
        return False
    text, rules = blank_transcript(episode), episode.protocol
    marks = _marks(rules.think, rules.query, rules.result, rules.answer).findall(text)
    # The format allows one answer, so the last mark is the only one; rfind finds it sooner.
    boxed = text[text.rfind(rules.answer.open) : text.rfind(rules.answer.close)]
    return (
        marks.count(rules.think.open) == marks.count(rules.think.close) > 0
        and marks.count(rules.answer.open) == marks.count(rules.answer.close) == 1
        and "\\boxed{" in boxed
        and "}" in boxed
        and _every_search_has_its_result(rules, marks)
    )


@lru_cache
def _marks(*tags: Tag) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(mark) for tag in tags for mark in tag))


def _every_search_has_its_result(rules: Protocol, marks: list[str]) -> bool:
    """Whether the end of the query, a result and its end follow each opening mark of a query."""
    at = 0
    try:
        while rules.query.open in marks[at:]:
            search = marks.index(rules.query.open, at)
            asked = marks.index(rules.query.close, search)
            opened = marks.index(rules.result.open, search)
            at = marks.index(rules.result.close, opened)
            if opened < asked:
                return False
    except ValueError:  # index did not find a mark
        return False
    return True


PAPER = Paper(
    protocol=RESEARCH,
    rewards={"research": research, "research-strict": research_strict},
    follows_format=research_format,
)
