"""What a search protocol is: the type, and what holds for every protocol.

The protocols of the papers are in :mod:`research_env.papers`. A protocol of your own is one more
:class:`Protocol` value, most often
``dataclasses.replace(RESEARCH, name="mine", query=Tag("<ask>", "</ask>"), prompts={}, ...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from research_env.errors import UnknownNameError
from research_env.markup import Tag, between, clean
from research_env.retrieval.base import MAX_QUERY_CHARACTERS, Hit
from research_env.tools import ToolFormat

ActionKind = Literal["search", "answer", "invalid"]
Message = dict[str, str]

TEMPLATES = ("base", "instruct", "question")
"""The names of the templates; ``question`` is the bare question and a newline, for small models."""


class Parsed(NamedTuple):
    """What an action asks for; ``query`` is empty unless it is a search."""

    kind: ActionKind
    query: str = ""


@dataclass(frozen=True, slots=True)
class Protocol:
    """Everything in which two search protocols differ.

    Attributes:
        name: what specs and command lines call it.
        think: marks of the reasoning.
        query: marks of a search query.
        result: marks of what the engine found.
        answer: marks of the final answer.
        terminators: generation pauses after the first of these; what follows it is ignored.
        parser: says what an action (cut after its terminator) asks for.
        renderer: the observation for the hits of a search, best first.
        extractor: the final answer in all that the policy wrote, or None.
        prompts: the papers' templates by name (``base``, ``instruct``), each a list of (role, text)
            in which ``{question}`` stands for the question.
        asker: how a question is written into those templates.
        hint: the observation after an invalid action; None: an invalid action ends the episode.
        max_searches: searches that an episode may run; None: no cap.
        max_turns: actions that an episode may take, the last of which cannot search; None: no cap.
        top_k: passages a search returns.
        reward: name of the reward that the authors train with.
        tool_format: of a protocol whose turns call tools, several at a time; None: any other.
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
    prompts: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict, hash=False)
    asker: Callable[[str], str] = str
    hint: str | None = None
    max_searches: int | None = None
    max_turns: int | None = None
    top_k: int = 5
    reward: str = "research"
    tool_format: ToolFormat | None = None

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

    def messages(self, template: str, question: str) -> list[Message]:
        """The prompt as chat messages, for a model with a chat template.

        Args:
            template: ``base``, ``instruct`` or ``question``.
            question: the question, put in as it is (nothing in it is syntax).

        Returns:
            Messages of ``role`` and ``content``. Where the last one is the assistant's
            (r1-searcher's ``instruct``), the model continues it rather than opening a turn.

        Raises:
            UnknownNameError: no such template, or this protocol has none of that name.
        """
        if template not in TEMPLATES:
            raise UnknownNameError("template", template, TEMPLATES)
        if template == "question":
            return [{"role": "user", "content": f"{question}\n"}]
        if template not in self.prompts:
            raise UnknownNameError(
                f"template of the protocol {self.name!r}",
                template,
                [*self.prompts, "question"],
                hint="Any protocol has the template 'question'.",
            )
        asked = self.asker(question)
        return [
            {"role": role, "content": text.replace("{question}", asked)}
            for role, text in self.prompts[template]
        ]

    def prompt(self, template: str, question: str) -> str:
        """The prompt as text: the first observation of an episode.

        Args:
            template: ``base``, ``instruct`` or ``question`` (exactly the question and a newline).
            question: the question, put in as it is (nothing in it is syntax).

        Returns:
            The text of the one message, or the contents of several with blank lines between them,
            for a model that has an ``instruct`` prompt but no chat template.

        Raises:
            UnknownNameError: as :meth:`messages`.
        """
        return "\n\n".join(each["content"] for each in self.messages(template, question))


def answer_or_invalid(protocol: Protocol, text: str) -> Parsed:
    """An answer if the text holds a complete one, else an invalid action."""
    return Parsed("answer" if between(text, protocol.answer) is not None else "invalid")
