"""Search-R1 (Jin et al. 2025): tags, parser, prompt and rewards.

One prompt serves base and instruction-tuned models, as the only message of the user where there is
a chat template; the question gets a question mark if it has none.

References:
    "Search-R1: Training LLMs to Reason and Leverage Search Engines with Reinforcement Learning"
    (arXiv:2503.09516); the code of PeterGriffinJin/Search-R1: the generation manager,
    ``scripts/data_process/qa_search_train_merge.py`` (the prompt, word for word) and
    ``verl/utils/reward_score/qa_em*.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from research_env.episode import Episode
from research_env.markup import Tag, defuse
from research_env.papers.base import Paper, blank_transcript, em_reward, once_per_episode
from research_env.protocol import Parsed, Protocol, answer_or_invalid
from research_env.retrieval.base import Hit

_TAG = re.compile(r"</?(?:think|search|information|answer)>")
_HOP = ["<think>", "</think>", "<search>", "</search>", "<information>", "</information>"]
_END = ["<think>", "</think>", "<answer>", "</answer>"]

_PROMPT = (
    "Answer the given question. "
    "You must conduct reasoning inside <think> and </think> first every time you get new "
    "information. "
    "After reasoning, if you find you lack some knowledge, you can call a search engine by "
    "<search> query </search> and it will return the top searched results between <information> "
    "and </information>. "
    "You can search as many times as your want. "
    "If you find no further external knowledge needed, you can directly provide the answer inside "
    "<answer> and </answer>, without detailed illustrations. For example, <answer> Beijing "
    "</answer>. Question: {question}\n"
)


def _parse_search_r1(protocol: Protocol, text: str) -> Parsed:
    """The query from the first opening mark to the terminator."""
    tag = protocol.query
    start = text.find(tag.open)
    if start >= 0 and text.endswith(tag.close):
        return Parsed("search", text[start + len(tag.open) : len(text) - len(tag.close)])
    return answer_or_invalid(protocol, text)


def _render_search_r1(protocol: Protocol, hits: Sequence[Hit]) -> str:
    """``Doc 1(Title: "...") text``, a line per passage, as in the authors' generation manager."""
    documents = "".join(
        f'Doc {number}(Title: "{defuse(hit.passage.title)}") {defuse(hit.passage.text)}\n'
        for number, hit in enumerate(hits, 1)
    )
    return f"\n\n{protocol.result.open}{documents.strip()}{protocol.result.close}\n\n"


def _extract_last(protocol: Protocol, response: str) -> str | None:
    """The last complete answer.

    The authors' code wants two, since their prompt's example is one.
    """
    tag, last, at = protocol.answer, None, 0
    while True:
        start = response.find(tag.open, at)
        end = response.find(tag.close, start + len(tag.open)) if start >= 0 else -1
        if end < 0:
            return last
        last = response[start + len(tag.open) : end].strip()
        at = end + len(tag.close)


def _with_question_mark(question: str) -> str:
    question = question.strip()
    return question if question.endswith("?") else f"{question}?"


SEARCH_R1 = Protocol(
    name="search-r1",
    think=Tag("<think>", "</think>"),
    query=Tag("<search>", "</search>"),
    result=Tag("<information>", "</information>"),
    answer=Tag("<answer>", "</answer>"),
    terminators=("</search>", "</answer>"),
    parser=_parse_search_r1,
    renderer=_render_search_r1,
    extractor=_extract_last,
    prompts={"base": (("user", _PROMPT),), "instruct": (("user", _PROMPT),)},
    asker=_with_question_mark,
    hint=(
        "\nMy previous action is invalid. If I want to search, I should put the query between "
        "<search> and </search>. If I want to give the final answer, I should put the answer "
        "between <answer> and </answer>. Let me try again.\n"
    ),
    max_searches=4,
    max_turns=5,
    top_k=3,
    reward="search-r1",
)


def search_r1(episode: Episode) -> float:
    """Search-R1's reward: exact match of the last answer with any gold, 1 or 0.

    The authors read prompt and response together, and take the last ``<answer>`` if there are two
    or more. Their prompt and their hint hold some: a response without an answer gets "Beijing" from
    the prompt, or "and" from the hint. Here the policy's words alone are read.

    Source: Jin et al. 2025, "Search-R1", ``verl/utils/reward_score/qa_em.py``.
    """
    return em_reward(episode)


def search_r1_format_reward(episode: Episode) -> float:
    """Search-R1's reward with format: 1, or 0.8 / 0.2 / 0.1 / 0.

    - A right answer: 1 with the format, else ``1 - structure`` = 0.8.
    - A wrong answer: ``structure`` = 0.2 with the format, else ``final`` = 0.1.
    - No answer: 0. The authors' code gives 0.1: it takes the example in the prompt as the answer.

    Their reward for passages that hold the answer is 0 in their settings, so it is left out.

    Source: ``verl/utils/reward_score/qa_em_format.py`` with the settings of
    ``scripts/nq_hotpotqa/v0.3/train_grpo_format.sh`` (structure_format_score 0.2,
    final_format_score 0.1, retrieval_score 0).
    """
    well_formed = search_r1_format(episode)
    if search_r1(episode):
        return 1.0 if well_formed else 0.8
    if well_formed:
        return 0.2
    return 0.0 if episode.prediction is None else 0.1


@once_per_episode
def search_r1_format(episode: Episode) -> bool:
    """Whether a response is think, search, information, ..., think, answer, and only that.

    Nothing but white space may stand outside the tags, and no tag inside another. Each search has
    its own thought before it. An action that got the hint breaks the format.

    Source: ``is_valid_sequence`` of ``verl/utils/reward_score/qa_em_format.py``.
    """
    text = blank_transcript(episode)
    tags = _TAG.findall(text)
    hops = (len(tags) - len(_END)) // len(_HOP)
    outside = _TAG.split(text)[::2]
    return tags == _HOP * hops + _END and not "".join(outside).strip()


PAPER = Paper(
    protocol=SEARCH_R1,
    rewards={"search-r1": search_r1, "search-r1-format": search_r1_format_reward},
    follows_format=search_r1_format,
)
