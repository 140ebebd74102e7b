"""The command line: ``research-env index | search | serve | play | datasets | judge``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, subcommand

from research_env.commands.datasets import Datasets
from research_env.commands.index import Index
from research_env.commands.judge import Judge
from research_env.commands.play import Play
from research_env.commands.search import Search
from research_env.commands.serve import Serve
from research_env.errors import ResearchEnvError
from research_env.system.terminal import escape_unencodable, escaped_logs, show

Command = (
    Annotated[Index, subcommand("index")]
    | Annotated[Search, subcommand("search")]
    | Annotated[Serve, subcommand("serve")]
    | Annotated[Play, subcommand("play")]
    | Annotated[Datasets, subcommand("datasets")]
    | Annotated[Judge, subcommand("judge")]
)


@escaped_logs()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments (``sys.argv`` if None) ask for.

    Exits with 2 and one line on stderr if a command cannot be carried out, and with 130 if it is
    interrupted.
    """
    escape_unencodable()
    chosen: Any = tyro.cli(
        Annotated[Command, OmitArgPrefixes],
        args=arguments,
        prog="research-env",
        description="Data, indexes and environments in which language models learn to search.",
    )
    try:
        chosen.run()
    except KeyboardInterrupt:
        show("research-env: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output, for example head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ResearchEnvError, OSError) as error:  # OSError: no permission, disk full
        show(f"research-env: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
