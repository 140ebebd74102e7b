"""The errors of this package: messages say what was wrong, with which value, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from research_env.system.redaction import redact_known


class ResearchEnvError(Exception):
    """Base of every error that this package raises on purpose; its message shows no secret."""

    def __init__(self, *args: object) -> None:
        """Take the message, and redact secrets in it."""
        super().__init__(*(redact_known(each) if isinstance(each, str) else each for each in args))

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException would call the class, whose __init__ may take other arguments.
        return _restore, (type(self), self.args), self.__dict__


def _restore(kind: type[ResearchEnvError], args: tuple[object, ...]) -> ResearchEnvError:
    """An error with this message, whatever the arguments of its class are."""
    error = kind.__new__(kind)
    ResearchEnvError.__init__(error, *args)
    return error


class UnknownNameError(ResearchEnvError, ValueError):
    """A data set, split, protocol, reward, template or retriever that does not exist."""

    def __init__(self, what: str, name: object, known: Iterable[str], hint: str = "") -> None:
        """Say what kind of name it is (``what``), and list the known ones and the closest."""
        names = sorted(known)
        folded = {each.casefold(): each for each in names}
        close = get_close_matches(str(name)[:100].casefold(), folded, n=1)
        guess = f" Did you mean {folded[close[0]]!r}?" if close else ""
        extra = f" {hint}" if hint else ""
        super().__init__(f"unknown {what} {name!r}; known: {', '.join(names)}.{guess}{extra}")


class ConfigurationError(ResearchEnvError, ValueError):
    """A setting whose value cannot be used, for example ``top_k=0``."""


class UnknownTaskError(ConfigurationError, IndexError):
    """A task that does not exist: an unknown id, or a number out of range."""


class DataError(ResearchEnvError, ValueError):
    """A question file or corpus that cannot be read; the message says in which line and why."""


class DataNotFoundError(ResearchEnvError, FileNotFoundError):
    """A data set that is neither in a local folder nor on a hub that answers."""


class StaleIndexError(ResearchEnvError):
    """An index that is missing, damaged, of another version, or made from another corpus."""


class ActionError(ResearchEnvError, TypeError):
    """An action that is neither text nor, with tool calls, a structured turn."""


class ToolError(ResearchEnvError, ValueError):
    """Raised by a tool's function; the policy reads the message as the result of its call."""


class EpisodeError(ResearchEnvError, RuntimeError):
    """A step before reset, or after the end of the episode."""


class RewardError(ResearchEnvError, TypeError):
    """A reward function that failed, or returned something that is no finite number."""


class RetrievalError(ResearchEnvError):
    """The search engine could not answer; the episode becomes void."""


class ClosedError(RetrievalError):
    """A search after ``close``; it is raised rather than making the episode void."""

    def __init__(self) -> None:
        """Say what to do."""
        super().__init__("the searches have been closed; make a new environment to search again")
