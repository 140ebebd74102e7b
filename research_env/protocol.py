"""How a policy and a search engine speak: tags, parsing of actions, rendering of results.

Three protocols are given, each after its authors' code:

- ``research``: Chen et al. 2025, "ReSearch: Learning to Reason with Search for LLMs via
  Reinforcement Learning" (Agent-RL/ReCall, branch re-search, the vLLM rollout with search).
- ``r1-searcher``: Song et al. 2025, "R1-Searcher" (RUCAIBox/R1-Searcher, experience maker).
- ``search-r1``: Jin et al. 2025, "Search-R1" (PeterGriffinJin/Search-R1, generation manager).

A new protocol is one more :class:`Protocol` value, most often
``dataclasses.replace(RESEARCH, name="mine", query=Tag("<ask>", "</ask>"), ...)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from research_env.errors import UnknownNameError
from research_env.retrieval.base import MAX_QUERY_CHARACTERS, Hit

ActionKind = Literal["search", "answer", "invalid"]


class Tag(NamedTuple):
    """The marks that open and close a span of text."""

    open: str
    close: str


class Parsed(NamedTuple):
    """What an action asks for; ``query`` is empty unless it is a search."""

    kind: ActionKind
    query: str = ""


@dataclass(frozen=True, slots=True)
class Protocol:
    """Everything in which two search protocols differ.

    Attributes:
        name: by which specs and command lines name it.
        think: marks of the reasoning.
        query: marks of a search query.
        result: marks of what the engine found.
        answer: marks of the final answer.
        terminators: generation pauses after the first of these; what follows it is ignored.
        parser: says what an action (cut after its terminator) asks for.
        renderer: the observation for the hits of a search, best first.
        extractor: the final answer in all that the policy wrote, or None.
        hint: the observation after an invalid action; None: an invalid action ends the episode.
        max_searches: searches that an episode may run; None: no cap.
        max_turns: actions that an episode may take, the last of which cannot search; None: no cap.
        top_k: passages a search returns.
        reward: name of the reward that the authors train with.
    """

    name: str
    think: Tag
    query: Tag
    result: Tag
    answer: Tag
    terminators: tuple[str, ...]
    parser: Callable[[Protocol, str], Parsed]
    renderer: Callable[[Protocol, Sequence[Hit]], str]
    extractor: Callable[[Protocol, str], str | None]
    hint: str | None = None
    max_searches: int | None = None
    max_turns: int | None = None
    top_k: int = 5
    reward: str = "research"

    def cut(self, text: str) -> str:
        """The text up to and with the first terminator; all of it where there is none."""
        end = len(text)
        for terminator in self.terminators:
            at = text.find(terminator, 0, end)
            if at >= 0:
                end = at + len(terminator)
        return text[:end]

    def parse(self, action: str) -> Parsed:
        """What an action, already :meth:`cut`, asks for; its query is safe for any engine."""
        kind, query = self.parser(self, action)
        return Parsed(kind, clean(query.strip()[:MAX_QUERY_CHARACTERS]) if query else "")

    def render(self, hits: Sequence[Hit]) -> str:
        """The observation for the hits of a search: no passage can forge a tag in it."""
        return self.renderer(self, hits)

    def extract(self, response: str) -> str | None:
        """The final answer in all that the policy wrote (observations left out), or None."""
        return self.extractor(self, response)


# --- text that cannot be mistaken for markup -----------------------------------------------------

# Bytes of UTF-8 that a text must hold before it can need a change: "<", the backslash, control
# characters, and the first byte of two-byte controls (C2) and of surrogates (ED).
_SUSPECT = bytes((*range(9), *range(11, 32), 0x3C, 0x5C, 0x7F, 0xC2, 0xED))
_TAG = re.compile(r"<(?![\s\d=-]|\Z)")
_BOX = re.compile(r"\\(?=[bf]box|boxed)")
_NEWLINE = re.compile(r"\r\n?")
_KEPT_LENGTH = 2_000  # characters
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(text: str) -> str:
    """Replace control characters and lone surrogates by U+FFFD, so that any engine takes the text.

    Tabs and line feeds stay; a carriage return becomes a line feed.
    """
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw.translate(None, _SUSPECT)) == len(raw):
        return text
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", _NEWLINE.sub("\n", text))


def defuse(text: str) -> str:
    r"""Make a retrieved text harmless: after it no tag, chat token or ``\boxed`` is left.

    An angle bracket that could open a tag becomes ``‹`` (so ``</search>`` reads ``‹/search>``,
    ``<|im_end|>`` reads ``‹|im_end|>``, and ``a < b`` stays); the backslash of ``\boxed`` and
    ``\fbox`` becomes ``∖``; control characters become U+FFFD. A text without any of these, the
    ordinary case, is returned as it is.
    """
    # A group of samples reads the same passages again and again; very long ones are not kept.
    return _defused(text) if len(text) <= _KEPT_LENGTH else _defused.__wrapped__(text)


@lru_cache(maxsize=4096)
def _defused(text: str) -> str:
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw.translate(None, _SUSPECT)) == len(raw):
        return text
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", _NEWLINE.sub("\n", text))
    return _BOX.sub("∖", _TAG.sub("‹", text))


# --- ReSearch ------------------------------------------------------------------------------------


def _parse_research(protocol: Protocol, text: str) -> Parsed:
    """The last query before the terminator; a terminator alone asks for nothing and goes on."""
    tag = protocol.query
    if text.endswith(tag.close):
        start = text.rfind(tag.open)
        end = len(text) - len(tag.close)
        return Parsed("search", text[start + len(tag.open) : end] if start >= 0 else "")
    return _answer_or_invalid(protocol, text)


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
    answer = _between(response, protocol.answer)
    if answer is None:
        return None
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


# --- R1-Searcher ---------------------------------------------------------------------------------


def _parse_r1_searcher(protocol: Protocol, text: str) -> Parsed:
    """The last query before the terminator, without double quotes; an empty one is invalid."""
    tag = protocol.query
    if text.endswith(tag.close):
        start = text.rfind(tag.open)
        end = len(text) - len(tag.close)
        words = text[start + len(tag.open) : end].replace('"', "").split() if start >= 0 else []
        return Parsed("search", " ".join(words)) if words else Parsed("invalid")
    return _answer_or_invalid(protocol, text)


def _render_r1_searcher(protocol: Protocol, hits: Sequence[Hit]) -> str:
    """Numbered lines of title and text, as in the authors' corpus of abstracts; else "None"."""
    documents = "".join(
        f"({number})Title: {defuse(hit.passage.title)} Text: {defuse(hit.passage.text)}\n"
        for number, hit in enumerate(hits, 1)
    )
    return f"\n\n{protocol.result.open}\n{documents or 'None'}{protocol.result.close}\n\n"


def _extract_after_last_tag(protocol: Protocol, response: str) -> str | None:
    """What follows the last opening mark, up to a closing one; both must occur somewhere."""
    tag = protocol.answer
    if tag.open not in response or tag.close not in response:
        return None
    return response.rsplit(tag.open, 1)[1].split(tag.close, 1)[0].strip()


# --- Search-R1 -----------------------------------------------------------------------------------


def _parse_search_r1(protocol: Protocol, text: str) -> Parsed:
    """The span that the terminator closes, from the first mark that opens it."""
    tag = protocol.query
    start = text.find(tag.open)
    if start >= 0 and text.endswith(tag.close):
        return Parsed("search", text[start + len(tag.open) : len(text) - len(tag.close)])
    return _answer_or_invalid(protocol, text)


def _render_search_r1(protocol: Protocol, hits: Sequence[Hit]) -> str:
    """``Doc 1(Title: "...") text``, a line a passage, as in the authors' generation manager."""
    documents = "".join(
        f'Doc {number}(Title: "{defuse(hit.passage.title)}") {defuse(hit.passage.text)}\n'
        for number, hit in enumerate(hits, 1)
    )
    return f"\n\n{protocol.result.open}{documents.strip()}{protocol.result.close}\n\n"


def _extract_last(protocol: Protocol, response: str) -> str | None:
    """The last complete answer (the authors ask for a second: their prompt's example is one)."""
    tag, last, at = protocol.answer, None, 0
    while True:
        start = response.find(tag.open, at)
        end = response.find(tag.close, start + len(tag.open)) if start >= 0 else -1
        if end < 0:
            return last
        last = response[start + len(tag.open) : end].strip()
        at = end + len(tag.close)


# --- common parts --------------------------------------------------------------------------------


def _between(text: str, tag: Tag) -> str | None:
    """The first span between two marks, or None."""
    start = text.find(tag.open)
    end = text.find(tag.close, start + len(tag.open)) if start >= 0 else -1
    return text[start + len(tag.open) : end] if end >= 0 else None


def _answer_or_invalid(protocol: Protocol, text: str) -> Parsed:
    return Parsed("answer" if _between(text, protocol.answer) is not None else "invalid")


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
    top_k=5,
    reward="research",
)

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
    max_searches=8,
    top_k=3,
    reward="r1-searcher-stage2",
)

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

PROTOCOLS = {each.name: each for each in (RESEARCH, R1_SEARCHER, SEARCH_R1)}


def protocol(name: str | Protocol) -> Protocol:
    """The protocol of that name; a :class:`Protocol` is returned as it is.

    Raises:
        UnknownNameError: there is no protocol of that name.
    """
    if isinstance(name, Protocol):
        return name
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise UnknownNameError("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]
