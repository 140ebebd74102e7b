"""The tools of this package: ``search``, and ``open``, which reads whole documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from research_env.errors import RetrievalError, UnknownNameError
from research_env.markup import defuse
from research_env.retrieval.base import Hit, Retriever
from research_env.retrieval.documents import (
    Document,
    DocumentReader,
    count_pages,
    read_page,
)
from research_env.retrieval.requests import ToolResult
from research_env.tools.base import Tool, import_tool

SEARCH = Tool(
    name="search",
    description="Search Wikipedia; returns the passages that fit best.",
    parameters={"query": {"type": "string", "description": "What to search for."}},
    required=("query",),
)


def open_documents(
    retriever: Retriever, calls: Sequence[Mapping[str, Any]]
) -> list[ToolResult | RetrievalError]:
    """Read a page of a document for each call."""
    reader = cast(DocumentReader, retriever)  # the environment checks it, since OPEN.reads is set
    found = reader.read([arguments["document"] for arguments in calls])
    return [
        each if isinstance(each, RetrievalError) else _page(each, arguments)
        for each, arguments in zip(found, calls, strict=True)
    ]


OPEN = Tool(
    name="open",
    description="Read a whole document of the corpus, page by page.",
    parameters={
        "document": {
            "type": "string",
            "description": "The id of a passage that a search has returned, or a title.",
        },
        "page": {
            "type": "integer",
            "description": "Which page to read, from 1 on. Default: the one with the passage.",
        },
    },
    required=("document",),
    runner=open_documents,
    reads=True,
)


TOOLS: dict[str, Tool] = {each.name: each for each in (SEARCH, OPEN)}
"""The tools of this package by name."""


def find_tools(tools: str | Sequence[str | Tool]) -> tuple[Tool, ...]:
    """Find tools by name.

    Args:
        tools: names, or one text of names with commas between; or the tools themselves. A name is
            ``search``, ``open``, or "module:NAME" for a tool of your own.

    Raises:
        UnknownNameError: there is no tool of that name.
        ConfigurationError: "module:NAME" cannot be imported, or is no tool.
    """
    named = tools.split(",") if isinstance(tools, str) else tools
    return tuple(each if isinstance(each, Tool) else _find(str(each).strip()) for each in named)


def _find(name: str) -> Tool:
    if ":" in name:
        return import_tool(name)
    if name not in TOOLS:
        raise UnknownNameError("tool", name, TOOLS, "Name your own as 'module:NAME'.")
    return TOOLS[name]


def show_hits(hits: Sequence[Hit], *, ids: bool = False) -> str:
    """Passages in the form of FlashRAG's Wikipedia, with blank lines between, without markup.

    Args:
        hits: best first.
        ids: begin each passage with its id, so that it can be opened.
    """
    passages = [
        (f"[{defuse(hit.passage.id)}] " if ids else "")
        + (f'"{defuse(hit.passage.title)}"\n' if hit.passage.title else "")
        + defuse(hit.passage.text)
        for hit in hits
    ]
    return "\n\n".join(passages).strip() or "nothing found"


def _page(document: Document | None, arguments: Mapping[str, Any]) -> ToolResult:
    name, number = arguments["document"], arguments.get("page")
    if document is None:
        return ToolResult(
            f"error: there is no document {name[:200]!r}; give the id of a passage or a whole title"
        )
    page = read_page(document, number)
    if page is None:
        return ToolResult(
            f"error: {name[:200]!r} has the pages 1 to {count_pages(document)}, not {number}"
        )
    heading = f'"{page.title}" ' if page.title else ""
    text = f"{heading}(page {page.number} of {page.count})\n{page.text}"
    return ToolResult(text, tuple(Hit(passage, 0.0) for passage in page.passages))
