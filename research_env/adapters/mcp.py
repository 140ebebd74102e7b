"""MCP: a server of the search tools, for clients of the Model Context Protocol.

Example:
    .. code-block:: python

        sessions = tool_sessions("elasticsearch://localhost:9200/wiki18")
        with AppServer(make_app(sessions)) as server:
            async with mcp.Client(f"{server.url}/mcp") as client:
                result = await client.call_tool("search", {"query": "who founded Citibank"})

``research-env serve --mcp`` starts the same server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from research_env.adapters import require
from research_env.datasets.base import Corpus, Dataset, Question
from research_env.errors import ConfigurationError
from research_env.retrieval.base import Retriever
from research_env.sessions import Sessions
from research_env.tools import Call, ToolTurn

require("mcp", "2", "mcp")

from mcp.server import Server  # noqa: E402
from mcp.server.transport_security import TransportSecuritySettings  # noqa: E402
from mcp_types import CallToolResult, ListToolsResult, TextContent, Tool  # noqa: E402

if TYPE_CHECKING:
    from starlette.types import ASGIApp


def tool_sessions(
    retriever: str | Retriever | None, corpus: Corpus | None = None, **settings: Any
) -> Sessions:
    """Sessions for calls of tools alone; their one question is empty.

    Args:
        retriever: the search engine; None searches the corpus.
        corpus: the passages.
        **settings: other settings of sessions: ``top_k``, ``tools``, ``protocol="recall"``, ...
    """
    nothing = Dataset("tools", (Question("tools", "", ("",)),), corpus)
    settings = {"protocol": "tool-calls", **settings}
    return Sessions(dataset=nothing, retriever=retriever, **settings)


def make_server(sessions: Sessions) -> Server[Any]:
    """A server of the tools of the sessions' protocol.

    Each call is played in an episode of its own, so a client reads the same text as a policy does,
    and searches of all clients share calls of the engine. Wrong arguments and a failed engine are
    results with ``is_error``.

    Args:
        sessions: their protocol has tools.

    Raises:
        ConfigurationError: the protocol has no tools, or the limits allow no call.
    """
    tools = sessions.core.protocol.tools
    if not tools:
        raise ConfigurationError(
            f"the protocol {sessions.core.protocol.name!r} has no tools; use 'tool-calls'"
        )
    if sessions.core.max_turns == 1 or sessions.core.max_searches == 0:
        raise ConfigurationError("no call can be run with max_turns=1 or max_searches=0")
    listed = [
        Tool(
            name=tool.name,
            description=tool.description,
            input_schema=tool.schema["function"]["parameters"],
        )
        for tool in tools
    ]

    async def list_tools(context: Any, params: Any) -> ListToolsResult:
        return ListToolsResult(tools=listed)

    async def call_tool(context: Any, params: Any) -> CallToolResult:
        session = sessions.open(0)
        call = Call(name=params.name, arguments=params.arguments or {})
        output = await session.astep(ToolTurn(calls=(call,)))
        if output.info["void"]:
            text = "error: the search engine failed; try again later"
        else:
            text = output.info["messages"][0]["content"]
        # A passage may begin like an error.
        failed = text.startswith("error: ") and not output.info["passage_ids"]
        return CallToolResult(content=[TextContent(type="text", text=text)], is_error=failed)

    return Server("research-env", on_list_tools=list_tools, on_call_tool=call_tool)


def make_app(sessions: Sessions) -> ASGIApp:
    """The application that serves the tools at ``/mcp`` (streamable HTTP, without sessions)."""
    # AppServer checks Host and Origin itself.
    security = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    return make_server(sessions).streamable_http_app(
        stateless_http=True, json_response=True, transport_security=security
    )
