"""The type of a search protocol, and the rules that hold for every protocol.

The protocols of the papers are in :mod:`research_env.papers`. A protocol of your own is one more
:class:`Protocol` value, most often
``dataclasses.replace(RESEARCH, name="mine", query=Tag("<ask>", "</ask>"), prompts={}, ...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from research_env.errors import ConfigurationError, UnknownNameError
from research_env.markup import Tag, between, clean, defuse
from research_env.retrieval.base import MAX_QUERY_CHARACTERS, Hit, Passage
from research_env.tools.base import Tool
from research_env.tools.formats import ToolFormat

ActionKind = Literal["search", "answer", "invalid"]
Message = dict[str, str]
Prompts = Mapping[str, Sequence[tuple[str, str]]]
"""Templates by name, each a list of (role, text)."""

TEMPLATES = ("base", "instruct", "question")
"""The names of the templates; ``question`` is the bare question and a newline, for small models."""

_OWN_TEMPLATE = (
    "Any protocol has the template 'question', and takes one of your own: a text that contains "
    "{question}, a file of such a text (.txt), or a file of chat messages (.jsonl, .yaml)."
)


class Parsed(NamedTuple):
    """What an action asks for; ``query`` is empty unless it is a search."""

    kind: ActionKind
    query: str = ""


@dataclass(frozen=True, slots=True)
class Protocol:
    """Everything in which two search protocols differ.

    Attributes:
        name: what specs and command lines call it.
        think: marks around the reasoning.
        query: marks around a search query.
        result: marks around the passages that the engine found.
        answer: marks around the final answer.
        terminators: generation pauses after the first of these; what follows it is ignored.
        parser: reads what an action, already :meth:`cut`, asks for.
        renderer: writes the observation for the hits of a search, best first.
        extractor: finds the final answer in all that the policy wrote, or None.
        prompts: the papers' templates by name (``base``, ``instruct``), each a list of (role, text)
            in which ``{question}`` stands for the question.
        asker: turns a question into the text that ``{question}`` stands for.
        hint: the observation after an invalid action; None: an invalid action ends the episode.
        max_searches: searches that an episode may run; None: no limit.
        max_turns: actions that an episode may take, the last of which cannot search; None: no
            limit.
        top_k: passages that a search returns.
        reward: name of the reward that the authors train with.
        tool_format: how turns call tools, several at a time; None: the protocol has no tools.
        tools: the tools that may be called.
        tool_prompts: makes the templates for given tools and a format; None: the protocol has no
            tools.
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
    prompts: Prompts = field(default_factory=dict, hash=False)
    asker: Callable[[str], str] = str
    hint: str | None = None
    max_searches: int | None = None
    max_turns: int | None = None
    top_k: int = 5
    reward: str = "research"
    tool_format: ToolFormat | None = None
    tools: tuple[Tool, ...] = ()
    tool_prompts: Callable[[Sequence[Tool], ToolFormat], Prompts] | None = None

    def with_tools(self, tools: Sequence[Tool], tool_format: ToolFormat | None = None) -> Protocol:
        """The same protocol with other tools.

        Args:
            tools: at least one, each with a name of its own.
            tool_format: how the policy's model writes calls; None: the protocol's own.

        Raises:
            ConfigurationError: the tools cannot be used, or the protocol has none, or its format
                cannot be changed.
        """
        own = self.tool_format
        if self.tool_prompts is None:
            raise ConfigurationError(
                f"the protocol {self.name!r} has no tools; use protocol='tool-calls'"
            )
        if own is not None and tool_format not in (None, own) and not own.lists_tools:
            raise ConfigurationError(
                f"the protocol {self.name!r} has a format of its own; leave tool_format out, or "
                "use protocol='tool-calls'"
            )
        names = [tool.name for tool in tools]
        if not names or len(set(names)) < len(names):
            raise ConfigurationError(f"tools are at least one, each of its own name, not {names}")
        chosen = tool_format or own
        if chosen is None:
            raise ConfigurationError(f"the protocol {self.name!r} needs a tool_format")
        return replace(
            self,
            terminators=chosen.terminators,
            prompts=self.tool_prompts(tools, chosen),
            tool_format=chosen,
            tools=tuple(tools),
        )

    def cut(self, text: str) -> str:
        """The text up to and with the first terminator; all of it if there is none."""
        end = len(text)
        for terminator in self.terminators:
            at = text.find(terminator, 0, end)
            if at >= 0:
                end = at + len(terminator)
        return text[:end]

    def parse(self, action: str) -> Parsed:
        """What an action, already :meth:`cut`, asks for; the query is safe for any engine."""
        kind, query = self.parser(self, action)
        return Parsed(kind, clean(query.strip()[:MAX_QUERY_CHARACTERS]) if query else "")

    def render(self, hits: Sequence[Hit]) -> str:
        """The observation for the hits of a search: no passage can forge a tag in it."""
        marks = (*self.query, *self.result)
        unusual = [mark for mark in marks if len(mark) > 1 and defuse(mark) == mark]
        return self.renderer(self, [_without(hit, unusual) for hit in hits] if unusual else hits)

    def extract(self, response: str) -> str | None:
        """The final answer in all that the policy wrote (observations left out), or None."""
        return self.extractor(self, response)

    def messages(self, template: str, question: str) -> list[Message]:
        """The prompt as chat messages, for a model with a chat template.

        Args:
            template: one of the `prompts`, or ``question``.
            question: the question, put in as it is (nothing in it is syntax).

        Returns:
            Messages with ``role`` and ``content``. If the last one is the assistant's
            (r1-searcher's ``instruct``), the model continues it rather than beginning a turn.

        Raises:
            UnknownNameError: this protocol has no template of that name.
        """
        if template == "question":
            return [{"role": "user", "content": f"{question}\n"}]
        if template not in self.prompts:
            known = [*self.prompts, "question"]
            what = "template" + (f" of the protocol {self.name!r}" if template in TEMPLATES else "")
            raise UnknownNameError(what, template, known, hint=_OWN_TEMPLATE)
        asked = self.asker(question)
        return [
            {"role": role, "content": text.replace("{question}", asked)}
            for role, text in self.prompts[template]
        ]

    def prompt(self, template: str, question: str) -> str:
        """The prompt as text: the first observation of an episode.

        Args:
            template: one of the `prompts`, or ``question`` (exactly the question and a newline).
            question: the question, put in as it is (nothing in it is syntax).

        Returns:
            The contents of the :meth:`messages`, with blank lines between them.

        Raises:
            UnknownNameError: as :meth:`messages`.
        """
        return "\n\n".join(each["content"] for each in self.messages(template, question))


def _without(hit: Hit, marks: Sequence[str]) -> Hit:
    """A hit whose passage holds none of the marks: their first character is replaced by ``‹``."""
    title, text = hit.passage.title, hit.passage.text
    for mark in marks:
        title, text = (part.replace(mark, f"‹{mark[1:]}") for part in (title, text))
    return Hit(Passage(hit.passage.id, title, text), hit.score)


def answer_or_invalid(protocol: Protocol, text: str) -> Parsed:
    """An answer if the text holds a complete one, else an invalid action."""
    return Parsed("answer" if between(text, protocol.answer) is not None else "invalid")
