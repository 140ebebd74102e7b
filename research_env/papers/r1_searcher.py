"""R1-Searcher (Song et al. 2025): tags, parser, prompts and rewards.

Both of its prompts end in ``<think>``, so its responses open no think tag of their own.

References:
    "R1-Searcher: Incentivizing the Search Capability in LLMs via Reinforcement Learning"
    (arXiv:2503.05592); the code of RUCAIBox/R1-Searcher: the experience maker,
    ``openrlhf/datasets/prompts_dataset.py`` (the prompts, word for word) and
    ``train/reward_server_*.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from research_env.episode import Episode
from research_env.markup import Tag, defuse, last_before_end
from research_env.metrics import cover_exact_match, exact_match, f1, normalize_r1_searcher
from research_env.papers.base import Paper, blank_transcript, once_per_episode
from research_env.protocol import Parsed, Protocol, answer_or_invalid
from research_env.retrieval.base import Hit

MAX_ANSWER_WORDS = 10  # in the second stage
_MAX_ANSWER_CHARACTERS = 40  # about as long
_CHINESE = re.compile("[\u4e00-\u9fff]")

_BASE = (
    "The User asks a question, and the Assistant solves it.\n"
    "The Assistant first thinks about the reasoning process in the mind and then provides the User "
    "with the final answer.\n"
    "The output format of reasoning process and final answer are enclosed within <think> </think> "
    'and <answer> </answer> tags, respectively, i.e., "<think> reasoning process here </think>\n'
    "\n"
    '<answer> final answer here </answer>".\n'
    "During the thinking process, **the Assistant can perform searching** for uncertain knowledge "
    'if necessary with the format of "<|begin_of_query|> search query (only list keywords, such as '
    '**"keyword_1 keyword_2 ..."**)<|end_of_query|>". **A query must involve only a single '
    "triple**.\n"
    "Then, the search system will provide the Assistant with the retrieval information with the "
    'format of "<|begin_of_documents|> ...search results... <|end_of_documents|>".\n'
    "\n"
    "User:{question}\n"
    "Assistant: <think>"
)

_SYSTEM = (
    "You are a helpful assistant.\n"
    "Given a question, you should answer it by first thinking about the reasoning process in the "
    "mind and then providing the final answer.\n"
    "The output format of reasoning process and final answer are enclosed within <think> </think> "
    'and <answer> </answer> tags, respectively, i.e., "<think> reasoning process here </think>\n'
    "\n"
    '<answer> final answer here </answer>".\n'
    "During the thinking process, **you can perform searching for uncertain knowledge** if "
    'necessary with the format of "<|begin_of_query|> search query (only list keywords, such as '
    '**"keyword_1 keyword_2 ..."**)<|end_of_query|>". **A query must involve only a single '
    "triple**.\n"
    "Then, the search system will provide you with the retrieval information with the format of "
    '"<|begin_of_documents|> ...search results... <|end_of_documents|>".'
)


def _parse_r1_searcher(protocol: Protocol, text: str) -> Parsed:
    """The last query before the terminator, without double quotes; an empty one is invalid."""
    tag = protocol.query
    if text.endswith(tag.close):
        words = (last_before_end(text, tag) or "").replace('"', "").split()
        return Parsed("search", " ".join(words)) if words else Parsed("invalid")
    return answer_or_invalid(protocol, text)


def _render_r1_searcher(protocol: Protocol, hits: Sequence[Hit]) -> str:
    """Numbered lines of title and text, as in the authors' corpus of abstracts; else "None"."""
    documents = "".join(
        f"({number})Title: {defuse(hit.passage.title)} Text: {defuse(hit.passage.text)}\n"
        for number, hit in enumerate(hits, 1)
    )
    return f"\n\n{protocol.result.open}\n{documents or 'None'}{protocol.result.close}\n\n"


def _extract_after_last_tag(protocol: Protocol, response: str) -> str | None:
    """The text after the last opening mark, up to a closing one; both must occur somewhere."""
    tag = protocol.answer
    if tag.open not in response or tag.close not in response:
        return None
    return response.rsplit(tag.open, 1)[1].split(tag.close, 1)[0].strip()


R1_SEARCHER = Protocol(
    name="r1-searcher",
    think=Tag("<think>", "</think>"),
    query=Tag("<|begin_of_query|>", "<|end_of_query|>"),
    result=Tag("<|begin_of_documents|>", "<|end_of_documents|>"),
    answer=Tag("<answer>", "</answer>"),
    terminators=("<|end_of_query|>",),
    parser=_parse_r1_searcher,
    renderer=_render_r1_searcher,
    extractor=_extract_after_last_tag,
    prompts={
        "base": (("user", _BASE),),
        "instruct": (("system", _SYSTEM), ("user", "{question}"), ("assistant", "<think>")),
    },
    max_searches=8,
    top_k=3,
    reward="r1-searcher-stage2",
)


def _compare(metric: Callable[..., float], episode: Episode) -> float:
    """A metric of the prediction and the first gold, normalized as in the authors' code.

    One difference: where ``</answer>`` comes before the last ``<answer>`` only, their answer ends
    in the tokenizer's end token, which counts as a word.
    """
    golds, language = episode.question.answers[:1], episode.metric_language
    return metric(episode.prediction, golds, normalize_r1_searcher, language=language)


def r1_searcher_stage1(episode: Episode) -> float:
    """R1-Searcher's first stage: learn to retrieve, and the format.

    ``r = (1 if the answer covers the gold, else -1) + 0.5 [retrieved] + 0.5 [format]``.

    - Covers: cover exact match with the first gold; without a complete answer tag it is false.
    - Retrieved: at least one search, and each query mark has its documents.
    - Format: no ``<think>`` (the prompt ends in it), one ``</think>``, one ``<answer>``, one
      ``</answer>``.

    The paper prints the two halves only; the first term comes from the authors' code.

    Source: RUCAIBox/R1-Searcher, ``train/reward_server_llama_stage1.py``.
    """
    text = blank_transcript(episode)
    covered = _compare(cover_exact_match, episode)
    retrieved = episode.protocol.query.open in text and _queries_match_documents(episode, text)
    return 2.0 * covered - 1.0 + 0.5 * retrieved + 0.5 * _one_thought_one_answer(episode, text)


def r1_searcher_stage1_guarded(episode: Episode) -> float:
    """`r1_searcher_stage1` in which a long answer covers nothing (`has_long_answer`).

    It is not a paper's reward: in the authors' first stage, copying all passages into the answer
    pays nearly as much as knowing it.
    """
    covered = _compare(cover_exact_match, episode) if has_long_answer(episode) else 0.0
    return r1_searcher_stage1(episode) - 2.0 * covered


def has_long_answer(episode: Episode) -> bool:
    """Whether the prediction has more than ten words, the limit of R1-Searcher's second stage.

    Chinese and Japanese are written without spaces: there it is more than 40 characters.
    """
    answer = episode.prediction or ""
    if episode.metric_language in ("zh", "ja"):
        return len(answer) > _MAX_ANSWER_CHARACTERS
    return len(answer.split()) > MAX_ANSWER_WORDS


def r1_searcher_stage2(episode: Episode) -> float:
    """R1-Searcher's second stage: F1 with the first gold, less 2 where the format is broken.

    ``r = F1(a_pred, a_gold) - 2 [not format]``, see `r1_searcher_format`. The normalization is
    `metrics.normalize_r1_searcher`. For Llama see `r1_searcher_stage2_llama`.

    Source: RUCAIBox/R1-Searcher, ``train/reward_server_qwen_zero.py``.
    """
    return _compare(f1, episode) - _r1_searcher_penalty(episode)


def r1_searcher_stage2_cem(episode: Episode) -> float:
    """`r1_searcher_stage2` with cover exact match in place of F1.

    Source: Song et al. 2025, "R1-Searcher", the study of rewards; ``cover_exact_match_score_1`` of
    ``train/reward_server_qwen_zero.py``.
    """
    return _compare(cover_exact_match, episode) - _r1_searcher_penalty(episode)


def r1_searcher_stage2_em(episode: Episode) -> float:
    """`r1_searcher_stage2` with exact match in place of F1.

    Source: Song et al. 2025, "R1-Searcher", the study of rewards; ``exact_match_score`` of
    ``train/reward_server_qwen_zero.py``.
    """
    return _compare(exact_match, episode) - _r1_searcher_penalty(episode)


def r1_searcher_stage2_llama(episode: Episode) -> float:
    """R1-Searcher's second stage for Llama: F1 with the first gold, less 1 for a broken format.

    The format is that of `r1_searcher_format` without its conditions on words and answers.

    Source: RUCAIBox/R1-Searcher, ``train/reward_server_llama_stage2.py``.
    """
    text = blank_transcript(episode)
    well_formed = (
        _queries_match_documents(episode, text)
        and _one_thought_one_answer(episode, text)
        and not _CHINESE.search(_without_documents(episode, text))
    )
    return _compare(f1, episode) - (0.0 if well_formed else 1.0)


@once_per_episode
def r1_searcher_format(episode: Episode) -> bool:
    """Whether a response has the format of R1-Searcher's second stage.

    Each query mark has its documents; no ``<think>`` (the prompt ends in it), one ``</think>``, one
    ``<answer>``, one ``</answer>``; no query or documents inside the answer, which has at most ten
    words; neither "assistant" nor "Assistant" anywhere; no Chinese character outside of documents.
    A response without a search, with text after the answer, or of an episode that was cut short can
    have the format too. After a chat of the user's own, which does not end in ``<think>``, the chat
    template or the response opens the thought.

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
        and len(answer.split()) <= MAX_ANSWER_WORDS
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
    opened = int(episode.chat)  # otherwise the prompt ends in the mark that opens it
    return [text.count(mark) for mark in marks] == [opened, 1, 1, 1]


def _without_documents(episode: Episode, text: str) -> str:
    """The text without the spans from an opening mark of documents to the next closing one."""
    result = episode.protocol.result
    kept, at = [], 0
    while (start := text.find(result.open, at)) >= 0:
        end = text.find(result.close, start)
        if end < 0:
            break
        kept.append(text[at:start])
        at = end + len(result.close)
    return "".join((*kept, text[at:]))


PAPER = Paper(
    protocol=R1_SEARCHER,
    rewards={
        "r1-searcher-stage1": r1_searcher_stage1,
        "r1-searcher-stage2": r1_searcher_stage2,
        "r1-searcher-stage2-cem": r1_searcher_stage2_cem,
        "r1-searcher-stage2-em": r1_searcher_stage2_em,
        "r1-searcher-stage2-llama": r1_searcher_stage2_llama,
    },
    follows_format=r1_searcher_format,
)
