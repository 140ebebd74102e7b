"""Try hostile inputs, each section in a process of its own, and count what becomes of them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from research_agent.errors import ResearchAgentError
from research_env.errors import ResearchEnvError
from research_env.retrieval.base import Passage

TIMEOUT = 60.0  # seconds for one input
START_TIMEOUT = 600.0  # seconds for a process to start, and to make what its inputs share
MUTATIONS = 100  # random changes per kind of file
PASSAGES = 25_000  # size of the index; large enough for the compiled search


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        name: what it is.
        try_it: makes and uses the input in an empty folder. It returns whether the input was
            refused by an error in the answer; any exception is looked at too.
    """

    name: str
    try_it: Callable[[Path], bool]


@dataclass(frozen=True)
class Row:
    """What became of the inputs of one section.

    Attributes:
        section: its name.
        tried: inputs.
        refused: inputs that were not read.
        typed: refused inputs whose error is one of this package's.
        harmless: inputs that were read as data.
        killed: inputs that ended the process by a signal, or never ended.
        peak_mb: the most memory that an input took, in MB, above what the process had before.
        wrong: names of the inputs that were refused by a raw exception or killed the process.
    """

    section: str
    tried: int
    refused: int
    typed: int
    harmless: int
    killed: int
    peak_mb: float
    wrong: tuple[str, ...] = ()


def run_section(name: str, cases: Callable[[Path], Iterator[Case]]) -> Row:
    """Try all cases of a section.

    Args:
        name: name of the section.
        cases: yields them, the same ones each time, given a folder for what they share; it must be
            importable by name.
    """
    row = Row(name, 0, 0, 0, 0, 0, 0.0)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        while True:
            here, there = context.Pipe(duplex=False)
            work = context.Process(target=_try_all, args=(cases, Path(folder), row.tried, there))
            work.start()
            there.close()
            at, ended = "", False
            try:
                while here.poll(TIMEOUT if at else START_TIMEOUT):
                    told = here.recv()
                    if told is None:
                        ended = True
                        break
                    at, outcome, peak = told
                    if outcome:
                        row = _counted(row, at, outcome, peak)
            except EOFError:  # the process is dead
                pass
            work.kill()
            work.join()
            if ended:
                return row
            row = _counted(row, at, "killed", 0.0)


def _counted(row: Row, name: str, outcome: str, peak: float) -> Row:
    typed, raw = outcome == "typed", outcome.startswith("raw")
    wrong = (f"{name}: {outcome}",) if raw or outcome == "killed" else ()
    return replace(
        row,
        tried=row.tried + 1,
        refused=row.refused + (typed or raw),
        typed=row.typed + typed,
        harmless=row.harmless + (outcome == "harmless"),
        killed=row.killed + (outcome == "killed"),
        peak_mb=max(row.peak_mb, round(peak, 1)),
        wrong=row.wrong + wrong,
    )


def _try_all(
    cases: Callable[[Path], Iterator[Case]], folder: Path, skip: int, told: Connection
) -> None:
    os.environ["RESEARCH_CACHE"] = str(folder / "cache")
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # what libraries say of each input
    before = 0.0
    for number, case in enumerate(cases(folder)):
        if number < skip:
            continue
        before = before or _peak()
        told.send((case.name, "", 0.0))
        place = Path(tempfile.mkdtemp(dir=folder))
        try:
            outcome = "typed" if case.try_it(place) else "harmless"
        except (ResearchEnvError, ResearchAgentError):
            outcome = "typed"
        except Exception as error:
            outcome = f"raw {type(error).__name__}: {error}"[:300]
        shutil.rmtree(place, ignore_errors=True)
        told.send((case.name, outcome, _peak() - before))
    told.send(None)


def _peak() -> float:
    """The most memory that this process has had, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin at the parent's memory
        line = next(each for each in status.read_text().splitlines() if each.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def mutated(data: bytes, seed: str) -> bytes:
    """Some bytes changed, dropped, doubled or cut off."""
    rng, changed = random.Random(seed), bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(changed) or 1), rng.choice((1, 1, 4, 300))
        part = changed[place : place + length]
        new = rng.choice((rng.randbytes(len(part)), b"", bytes(part) * 2, b"\xff" * len(part)))
        changed[place : place + length] = new
    return bytes(changed[: len(changed) - rng.choice((0, 0, 1, 1000))])


def sparse(path: Path) -> None:
    """Make a file 3 GiB of NUL that take no room on the disk."""
    path.write_bytes(b"")
    os.truncate(path, 3 << 30)


class GeneratedPassages:
    """A corpus of random words."""

    name = "generated"

    def __iter__(self) -> Iterator[Passage]:
        """Yield the passages."""
        rng = random.Random(0)
        for i in range(PASSAGES):
            yield Passage(str(i), f"t{i}", " ".join(f"w{rng.randrange(3_000)}" for _ in range(12)))

    def fingerprint(self) -> str:
        """Say which corpus this is."""
        return "generated"
