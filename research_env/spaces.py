"""A Gymnasium space of texts, for single and vector environments."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence
from ctypes import c_uint32
from multiprocessing.sharedctypes import SynchronizedArray
from types import ModuleType
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from gymnasium import Space
from gymnasium.vector.utils import (
    create_shared_memory,
    read_from_shared_memory,
    write_to_shared_memory,
)

_ALPHABET = tuple("abcdefghijklmnopqrstuvwxyz    0123456789.,?'éßł漢字🙂")


class UnicodeText(Space[str]):
    r"""All strings: any length, any character, NUL and lone surrogates included.

    Gymnasium's own ``Text`` is a space of short strings over a small alphabet, and its shared
    memory loses all other characters. This one keeps them: as UTF-32, with a length.

    Attributes:
        terminators: strings after which a policy that writes an element of this space should pause.
        max_length: the longest text, in characters, that shared memory has room for.
        also: other types whose values are in the space; they are never sampled.

    Example:
        >>> "<think>\N{SNOWMAN}" in UnicodeText()
        True
        >>> UnicodeText(terminators=("</search>",)).terminators
        ('</search>',)
    """

    def __init__(
        self,
        *,
        terminators: Iterable[str] = (),
        max_length: int = 65_536,
        also: tuple[type, ...] = (),
        seed: int | np.random.Generator | None = None,
    ) -> None:
        """Make a space of texts; see the class for the arguments."""
        super().__init__(seed=seed)
        self.terminators = tuple(terminators)
        self.max_length = max_length
        self.also = also

    @property
    def is_np_flattenable(self) -> bool:
        """False: a text has no fixed shape."""
        return False

    def sample(self, mask: None = None, probability: None = None) -> str:
        """A short random text without terminators.

        Raises:
            ValueError: a mask or a probability was given; there is nothing to mask.
        """
        if mask is not None or probability is not None:
            raise ValueError("UnicodeText samples take neither a mask nor a probability")
        size = int(self.np_random.integers(1, 33))
        return "".join(_ALPHABET[i] for i in self.np_random.integers(0, len(_ALPHABET), size))

    def contains(self, x: Any) -> bool:
        """Whether it is a string, or one of the other types."""
        return isinstance(x, (str, *self.also))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, UnicodeText)
            and self.terminators == other.terminators
            and self.max_length == other.max_length
            and self.also == other.also
        )

    def __hash__(self) -> int:
        return hash((self.terminators, self.max_length, self.also))

    def __repr__(self) -> str:
        return f"UnicodeText(terminators={self.terminators!r}, max_length={self.max_length})"


class SharedTexts(Sequence[str]):
    """A view of the texts in a shared buffer, which decodes a text when it is read.

    Gymnasium reads shared memory once and returns deep copies of what it got. A deep copy of this
    view is a tuple of strings.
    """

    def __init__(self, buffer: npt.NDArray[np.uint32]) -> None:
        """View a buffer of shape (texts, 1 + max_length); a row is a length and its characters."""
        self._buffer = buffer

    def __len__(self) -> int:
        return len(self._buffer)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        row = self._buffer[index]
        return bytes(row[1 : 1 + int(row[0])]).decode("utf-32-le", "surrogatepass")

    def __deepcopy__(self, memo: dict[int, Any]) -> tuple[str, ...]:
        return tuple(self)


@create_shared_memory.register(UnicodeText)
def _create(
    space: UnicodeText, n: int = 1, ctx: ModuleType = multiprocessing
) -> SynchronizedArray[c_uint32]:
    array: SynchronizedArray[c_uint32] = ctx.Array(c_uint32, n * (1 + space.max_length))
    return array


@read_from_shared_memory.register(UnicodeText)
def _read(
    space: UnicodeText, shared_memory: SynchronizedArray[c_uint32], n: int = 1
) -> SharedTexts:
    buffer = np.frombuffer(shared_memory.get_obj(), dtype=np.uint32)  # type: ignore[call-overload]
    return SharedTexts(buffer.reshape(n, 1 + space.max_length))


@write_to_shared_memory.register(UnicodeText)
def _write(
    space: UnicodeText, index: int, value: str, shared_memory: SynchronizedArray[c_uint32]
) -> None:
    if len(value) > space.max_length:
        raise ValueError(
            f"a text of {len(value)} characters does not fit into shared memory made for "
            f"{space.max_length}; make the vector environment with shared_memory=False"
        )
    buffer = np.frombuffer(shared_memory.get_obj(), dtype=np.uint32)  # type: ignore[call-overload]
    row = buffer.reshape(-1, 1 + space.max_length)[index]
    row[1 : 1 + len(value)] = np.frombuffer(
        value.encode("utf-32-le", "surrogatepass"), dtype=np.uint32
    )
    row[0] = len(value)
