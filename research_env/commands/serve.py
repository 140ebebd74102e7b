"""The command ``research-env serve``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from research_env.commands.shared import first_retry_shown, named_corpus, parse_env_args
from research_env.errors import ConfigurationError

if TYPE_CHECKING:
    from research_env.sessions import Sessions


@dataclass(frozen=True)
class Serve:
    """Serve a search engine over HTTP, in the format of Search-R1's retrieval server.

    Any trainer that knows this format can search at http://HOST:PORT/retrieve. The server also has
    /health and /metrics (Prometheus). SIGTERM or Ctrl-C stops it after the requests in flight.

    With --openenv it serves the whole environment to clients of OpenEnv instead, and with --mcp the
    search tools to clients of the Model Context Protocol, at http://HOST:PORT/mcp.

    Without a key anyone who reaches the port can search. If the environment variable
    RETRIEVER_API_KEY is set, every request except /health needs "Authorization: Bearer KEY";
    retrievers of this package read the same variable and send it.

    Needs pip install 'research-env[serve]'.

    For example:
      research-env serve --retriever elasticsearch://localhost:9200/wiki18
      research-env serve --dataset musique
      RETRIEVER_API_KEY=... research-env serve --corpus passages.jsonl --host 0.0.0.0 --port 9000
      research-env serve --openenv --dataset musique --env-args protocol=search-r1
      research-env serve --mcp --retriever elasticsearch://localhost:9200/wiki18
    """

    retriever: Annotated[str | None, arg(metavar="URL")] = None
    """The search engine, for example embedded:DIR. Default: the index of the passages."""
    dataset: Annotated[str | None, arg(metavar="NAME")] = None
    """A data set whose passages are served, and indexed first if necessary: miniworld, musique,
    hotpotqa, 2wiki."""
    corpus: Annotated[Path | None, arg(metavar="FILE")] = None
    """A file of passages instead."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets other machines in, without any authentication unless
    RETRIEVER_API_KEY is set."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    allowed_hosts: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Names by which clients may call this server, for example search.example.org. localhost and
    the address of the server always work. Requests to other names are refused, so that no web page
    can search through the browser of somebody who reaches this server."""
    top_k: int | None = None
    """Passages per query, unless a request says it. Default: 5; with --openenv and --mcp the
    protocol's."""
    openenv: bool = False
    """Serve the environment to clients of OpenEnv. Needs pip install 'research-env[openenv]'."""
    mcp: bool = False
    """Serve the search tools to clients of MCP. Needs pip install 'research-env[mcp]'."""
    env_args: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")] = ()
    """With --openenv or --mcp: further arguments of the environment, for example split=dev."""

    @first_retry_shown()
    def run(self) -> None:
        """Carry the command out."""
        from research_env.retrieval import open_retriever  # noqa: PLC0415
        from research_env.retrieval.http import KEY_VARIABLE  # noqa: PLC0415
        from research_env.retrieval.url import secret_of  # noqa: PLC0415

        if self.openenv or self.mcp:
            self._serve_app(secret_of(KEY_VARIABLE))
            return
        if self.env_args:
            raise ConfigurationError("--env-args is for --openenv and --mcp")
        try:
            from research_env.retrieval.serve import serve_until_stopped  # noqa: PLC0415
            from research_env.retrieval.serve_guard import Limits  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"the server needs {error.name}: pip install 'research-env[serve]'"
            ) from error
        top_k, most = 5 if self.top_k is None else self.top_k, Limits().top_k
        if not 1 <= top_k <= most:
            raise ConfigurationError(f"--top-k is a number from 1 to {most}, not {top_k}")
        key = secret_of(KEY_VARIABLE)
        engine = open_retriever(self.retriever, self._corpus())
        try:
            serve_until_stopped(
                engine,
                self.host,
                self.port,
                top_k,
                key=key,
                allowed_hosts=self.allowed_hosts,
            )
        finally:
            engine.close()

    def _serve_app(self, key: str) -> None:
        """Serve OpenEnv or MCP."""
        if self.openenv and self.mcp:
            raise ConfigurationError("give one of --openenv and --mcp; each has a port of its own")
        try:
            from research_env.adapters.server import AppServer  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"the server needs {error.name}: pip install 'research-env[serve]'"
            ) from error
        with self._mcp_sessions() if self.mcp else self._openenv_sessions() as sessions:
            if self.mcp:
                from research_env.adapters.mcp import make_app  # noqa: PLC0415
            else:
                from research_env.adapters.openenv import make_app  # noqa: PLC0415

            server = AppServer(
                make_app(sessions), self.host, self.port, key=key, allowed_hosts=self.allowed_hosts
            )
            print(f"serving {server.url}{'/mcp' if self.mcp else ''}; Ctrl-C stops", flush=True)
            server.run()

    def _mcp_sessions(self) -> Sessions:
        from research_env.adapters.mcp import tool_sessions  # noqa: PLC0415

        return tool_sessions(self.retriever, self._corpus(), **self._env_args())

    def _openenv_sessions(self) -> Sessions:
        from research_env.sessions import Sessions  # noqa: PLC0415

        if self.dataset is None or self.corpus is not None:
            raise ConfigurationError(
                "--openenv needs --dataset NAME; for questions and passages of your own: "
                "--dataset custom --env-args questions=FILE corpus=FILE"
            )
        return Sessions(dataset=self.dataset, retriever=self.retriever, **self._env_args())

    def _corpus(self) -> Any:
        """Return the passages to serve, or None where the retriever has its own."""
        if self.dataset is None and self.corpus is None:
            if self.retriever is None:
                raise ConfigurationError("give --retriever URL, --dataset NAME or --corpus FILE")
            return None
        return named_corpus(self.dataset, self.corpus)

    def _env_args(self) -> dict[str, Any]:
        args = parse_env_args(self.env_args)
        flags = ("retriever", "dataset", "corpus") if self.mcp else ("retriever", "dataset")
        if self.top_k is not None:
            flags = (*flags, "top_k")
        for name in args.keys() & set(flags):
            flag = name.replace("_", "-")
            raise ConfigurationError(
                f"--env-args {name}=...: give --{flag} instead, which is a flag"
            )
        return args if self.top_k is None else {**args, "top_k": self.top_k}
