"""Judge predictions by a language model, as the papers do: ``research-env judge``.

How one verdict is asked for is in :mod:`research_env.judge_client`; here are the files.

Every episode that is not void is in the denominator. One without a prediction is wrong, and nobody
is asked. One whose verdict cannot be had makes the score a range.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from research_env.errors import ConfigurationError, DataError, UnknownNameError
from research_env.judge_client import (
    PROMPTS,
    RETRY,
    Endpoint,
    JudgeError,
    Outcome,
    ask_verdict,
    check_endpoint,
)
from research_env.progress import progress
from research_env.retrieval.retry import Retry

PREDICTIONS = "predictions.jsonl"
JUDGED = "judged.jsonl"
SUMMARY = "judge.json"
CACHE = "judge-cache.sqlite"

_ENOUGH = 20  # verdicts, to call a judge constant
_LOST = (
    8  # questions in a row without an answer, or as many as are asked at once: the server is gone
)
_CACHE_VERSION = 1  # of the table; in the file as its user_version

Key = tuple[str | int, int]
"""Which episode: its question's id, or the number of the episode where it has none; its sample."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Which judge, and how it is asked.

    Args:
        endpoint: address of an OpenAI-compatible server, such as ``http://localhost:8000/v1``.
        model: the name that the server knows.
        prompt: ``research`` or ``r1-searcher``.
        key: of the server; see `read_key`.
        concurrency: questions that are asked at the same time.
        rate: requests a second; None: any number.
        retry: deadline of a request with all its attempts, and the pauses between them.
        prices: of a million tokens in and out; None: cost is not counted.

    Raises:
        ConfigurationError: a value that cannot be used.
        UnknownNameError: no such prompt.
    """

    endpoint: str
    model: str
    prompt: str = "research"
    key: str = field(default="", repr=False)
    concurrency: int = 8
    rate: float | None = None
    retry: Retry = RETRY
    prices: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint)
        if self.prompt not in PROMPTS:
            raise UnknownNameError("prompt of a judge", self.prompt, PROMPTS)
        if not self.model.strip():
            raise ConfigurationError("--model is empty; give the name that the server knows")
        if self.concurrency < 1:
            raise ConfigurationError(f"--concurrency {self.concurrency} must be 1 or more")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ConfigurationError(f"--rate {self.rate} must be more than 0")
        if not 0 < self.retry.deadline < float("inf"):
            raise ConfigurationError(f"--deadline {self.retry.deadline} must be more than 0")
        if self.prices and not all(0 <= price < float("inf") for price in self.prices):
            raise ConfigurationError("--price-in and --price-out must be 0 or more")


@dataclass(frozen=True, slots=True)
class Summary:
    """What the judge said of a prediction file, as ``judge.json`` holds it.

    ``n`` episodes are in the denominator: ``right + wrong + missing``. ``no_prediction`` of the
    wrong ones had no prediction, so that nobody was asked. ``void`` ones are not in ``n``.
    ``score`` is None as long as verdicts are missing; ``range`` says what it may be: all missing
    ones wrong, all of them right. ``reasons`` says why they are missing.

    This run asked ``asked`` prompts (one that several samples share is asked once), and took the
    verdicts of ``from_cache`` episodes from the cache and of ``kept`` ones from ``judged.jsonl``.
    Answers, tokens and cost are those of all runs that wrote this ``judged.jsonl``.
    """

    predictions: str
    model: str
    prompt: str
    endpoint: str
    score: float | None
    range: tuple[float, float] | None
    n: int
    right: int
    wrong: int
    missing: int
    no_prediction: int
    void: int
    reasons: Mapping[str, int]
    warnings: tuple[str, ...]
    asked: int
    from_cache: int
    kept: int
    answers: int
    answers_without_usage: int
    tokens_in: int
    tokens_out: int
    cost: float | None


@dataclass(frozen=True, slots=True)
class Episode:
    """What a judge needs of a line of a prediction file."""

    key: Key
    void: bool
    question: str
    answers: tuple[str, ...]
    prediction: str  # blank: there is none

    @property
    def to_ask(self) -> bool:
        """Whether a judge is asked: it is not void, and there is a prediction."""
        return not self.void and bool(self.prediction.strip())


def read_episodes(path: Path) -> tuple[list[Episode], list[str]]:
    """Read a prediction file.

    Returns:
        The episodes, and warnings (a last line that is cut is not among the episodes).

    Raises:
        DataError: no such file, a line that is no episode, or one that comes twice.
    """
    if not path.is_file():
        raise DataError(f"there is no prediction file {path}; an evaluation writes one")
    episodes: list[Episode] = []
    warnings: list[str] = []
    lines: dict[Key, int] = {}
    broken: tuple[int, str] | None = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if broken:
                raise DataError(f"{path}:{broken[0]}: no JSON ({broken[1]}); mend or remove it")
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                broken = number, str(error)
                continue
            if isinstance(record, dict) and "header" in record:
                continue
            episode = _episode(record, f"{path}:{number}")
            first = lines.setdefault(episode.key, number)
            if first != number:
                raise DataError(
                    f"{path}: lines {first} and {number} are both sample {episode.key[1]} of "
                    f"{episode.key[0]!r}; an episode may come once"
                )
            episodes.append(episode)
    if broken:
        warnings.append(f"{path}:{broken[0]}: the last line is cut, and is left out")
    if not episodes:
        raise DataError(f"{path} holds no episode")
    return episodes, warnings


def judge_predictions(
    predictions: Path, settings: Settings, output: Path | None = None, *, show: bool = True
) -> Summary:
    """Have every prediction judged; go on where an earlier run stopped.

    Writes ``judged.jsonl`` (a line a verdict, as they come) and, however it ends, ``judge.json``
    into ``output``, and keeps the verdicts in ``judge-cache.sqlite`` beside the predictions. A
    missing verdict is asked for again by the next run. Not to be called in a running event loop.

    Args:
        predictions: see :func:`read_episodes`; or the folder that holds a ``predictions.jsonl``.
        settings: which judge.
        output: folder to write to; None: that of the predictions.
        show: a progress bar on standard error, where that is a terminal.

    Raises:
        DataError: a file that cannot be read.
        ConfigurationError: ``judged.jsonl`` is of another judge, or in use by another run.
        JudgeError: the endpoint is not there, or refuses every question.
    """
    if predictions.is_dir():
        predictions /= PREDICTIONS
    episodes, warnings = read_episodes(predictions)
    prompt = PROMPTS[settings.prompt]
    texts = {e.key: prompt.text(e.question, e.answers, e.prediction) for e in episodes if e.to_ask}
    digests = {key: _digest(settings.model, text) for key, text in texts.items()}
    output = output or predictions.parent
    output.mkdir(parents=True, exist_ok=True)
    with (
        _open_ledger(output / JUDGED, os.path.relpath(predictions, output), settings) as ledger,
        closing(_Cache(predictions.parent / CACHE)) as cache,
    ):
        counts = Counter(asked=0, from_cache=0, kept=0)
        waiting: dict[str, list[Key]] = {}  # of a prompt: the episodes that share it
        for each in episodes:
            digest = digests.get(each.key)
            if each.void:
                continue
            if ledger.verdict(each.key, digest) is not None:
                counts["kept"] += each.to_ask
            elif digest is None:
                ledger.write(each.key, None, Outcome(False))
            elif found := cache.get(digest):
                ledger.write(each.key, digest, found)
                counts["from_cache"] += 1
            else:
                waiting.setdefault(digest, []).append(each.key)
        problems = {key: "not asked" for keys in waiting.values() for key in keys}
        try:
            with _progress(sum(map(len, waiting.values())), show) as advance:

                def finished(digest: str, outcome: Outcome) -> None:
                    counts["asked"] += 1
                    if outcome.verdict is not None:
                        cache.put(digest, outcome)
                    for place, key in enumerate(waiting[digest]):
                        told = replace(outcome, answers=()) if place else outcome  # cost: once
                        ledger.write(key, digest, told)
                        problems[key] = outcome.problem.kind if outcome.problem else ""
                    advance(len(waiting[digest]), outcome.verdict)

                questions = {digest: texts[keys[0]] for digest, keys in waiting.items()}
                if questions:
                    asyncio.run(_ask_all(questions, settings, finished))
        finally:
            verdicts = {e.key: ledger.verdict(e.key, digests.get(e.key)) for e in episodes}
            reasons = Counter(problems[key] for key in problems if verdicts[key] is None)
            summary = _summarize(
                episodes,
                verdicts,
                predictions=predictions,
                settings=settings,
                reasons=dict(reasons),
                warnings=warnings,
                counts={**counts, **ledger.answers},
            )
            _write(output / SUMMARY, summary)
    return summary


def report(summary: Summary) -> str:
    """A summary in a few lines for people."""
    s = summary
    lines = []
    if s.range is None:
        lines.append("no score: every episode is void")
    elif s.score is not None:
        lines.append(f"score {s.score:.2%}: {s.right:,} of {s.n:,} right")
    else:
        low, high = s.range
        lines.append(
            f"score between {low:.2%} and {high:.2%}: {s.missing:,} of {s.n:,} verdicts are missing"
        )
        why = ", ".join(f"{count:,} {kind}" for kind, count in s.reasons.items())
        lines.append(f"missing: {why}; the same command asks for them again")
    lines.append(
        f"{s.right:,} right, {s.wrong:,} wrong; {s.no_prediction:,} of these have no prediction, "
        "which is wrong without asking"
    )
    if s.void:
        lines.append(f"{s.void:,} void episodes (failed infrastructure) are not counted")
    lines.append(
        f"asked {s.asked:,} now, {s.from_cache:,} from the cache, {s.kept:,} kept from before"
    )
    cost = "" if s.cost is None else f"; cost {s.cost:,.4f}"
    unknown = f" ({s.answers_without_usage:,} not counted)" if s.answers_without_usage else ""
    lines.append(
        f"{s.answers:,} answers of {s.model} in all{unknown}: {s.tokens_in:,} tokens in, "
        f"{s.tokens_out:,} out{cost}"
    )
    return "\n".join(lines)


async def _ask_all(
    questions: Mapping[str, str], settings: Settings, finished: Callable[[str, Outcome], None]
) -> None:
    """Ask every prompt, and hand on its digest and what it came to, as they come."""
    prompt = PROMPTS[settings.prompt]
    pending = iter(questions.items())
    most = max(_LOST, settings.concurrency)
    lost, answered = 0, False

    async def work(endpoint: Endpoint) -> None:
        nonlocal lost, answered
        for digest, text in pending:  # one iterator for all workers
            outcome = await ask_verdict(endpoint, prompt, text)
            finished(digest, outcome)
            answered = answered or bool(outcome.answers)
            refused = outcome.problem is not None and outcome.problem.refused
            lost = lost + 1 if not outcome.answers and not (refused and answered) else 0
            if lost == most:
                raise JudgeError(f"{lost} questions in a row without an answer: {outcome.problem}")

    endpoint = Endpoint(
        settings.endpoint,
        settings.model,
        key=settings.key,
        formats=prompt.formats,
        rate=settings.rate,
        retry=settings.retry,
    )
    try:
        async with endpoint, asyncio.TaskGroup() as group:
            for _ in range(min(settings.concurrency, len(questions))):
                group.create_task(work(endpoint))
    except ExceptionGroup as several:
        raise several.exceptions[0] from None


class _Ledger:
    """``judged.jsonl``: a header, then a line a verdict; of an episode the last line counts."""

    def __init__(self, path: Path, file: BinaryIO, header: Mapping[str, str]) -> None:
        """Read what is there, and cut off the end of a line that a killed run left."""
        self._file = file
        self._verdicts: dict[Key, tuple[str | None, bool | None]] = {}
        self.answers = Counter(answers=0, answers_without_usage=0, tokens_in=0, tokens_out=0)
        file.seek(0)
        whole, newline, rest = file.read().rpartition(b"\n")
        lines = whole.split(b"\n") if newline else []
        try:
            records = [json.loads(line) for line in lines]
            former = records[0]["header"] if records else None
            for record in records[1:]:
                self._take(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _foreign(path) from None
        if former is None and rest and not rest.startswith(b'{"header"'):
            raise _foreign(path)
        if former is not None and former != header:
            raise ConfigurationError(
                f"{path} holds other verdicts ({former}); give --output another folder, or move it "
                "away"
            )
        if rest:
            file.truncate(len(whole) + len(newline))
        if former is None:
            self._append({"header": dict(header)})

    def verdict(self, key: Key, digest: str | None) -> bool | None:
        """The verdict of an episode, where it was asked for with this prompt."""
        found, verdict = self._verdicts.get(key, (None, None))
        return verdict if found == digest else None

    def write(self, key: Key, digest: str | None, outcome: Outcome) -> None:
        """Append what asking for an episode's verdict came to."""
        metered = [answer.tokens for answer in outcome.answers if answer.tokens]
        record: dict[str, Any] = {
            "question_id" if isinstance(key[0], str) else "episode": key[0],
            "sample": key[1],
            "verdict": outcome.verdict,
            "asked": digest is not None,
            "raw": outcome.raw,
            "problem": str(outcome.problem) if outcome.problem else None,
            "digest": digest,
            "answers": len(outcome.answers),
            "answers_without_usage": len(outcome.answers) - len(metered),
            "tokens_in": sum(tokens[0] for tokens in metered),
            "tokens_out": sum(tokens[1] for tokens in metered),
        }
        self._append(record)
        self._take(record)

    def _take(self, record: Mapping[str, Any]) -> None:
        key = record["question_id"] if "question_id" in record else record["episode"]
        self._verdicts[key, record["sample"]] = record["digest"], record["verdict"]
        for name in self.answers:
            self.answers[name] += record[name]

    def _append(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()


@contextmanager
def _open_ledger(path: Path, predictions: str, settings: Settings) -> Iterator[_Ledger]:
    header = {"model": settings.model, "prompt": settings.prompt, "predictions": predictions}
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(f"another run is writing {path}; wait for it") from None
        yield _Ledger(path, file, header)


class _Cache:
    """Verdicts by the digest of model and prompt, in one SQLite database; others may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = sqlite3.connect(path, timeout=60.0)
        try:
            with self._guard():
                (version,) = self._file.execute("PRAGMA user_version").fetchone()
                (tables,) = self._file.execute("SELECT count(*) FROM sqlite_master").fetchone()
                if version != _CACHE_VERSION and (version, tables) != (0, 0):
                    raise sqlite3.DatabaseError("it is another database, or of another version")
                self._file.execute("PRAGMA synchronous = NORMAL")
                with self._file as transaction:
                    transaction.execute(
                        "CREATE TABLE IF NOT EXISTS verdicts (digest TEXT PRIMARY KEY, "
                        "verdict INTEGER NOT NULL, raw TEXT NOT NULL) WITHOUT ROWID"
                    )
                    transaction.execute(f"PRAGMA user_version = {_CACHE_VERSION}")
        except BaseException:
            self._file.close()
            raise

    def get(self, digest: str) -> Outcome | None:
        with self._guard():
            select = "SELECT verdict, raw FROM verdicts WHERE digest = ?"
            row = self._file.execute(select, (digest,)).fetchone()
        return Outcome(bool(row[0]), row[1]) if row else None

    def put(self, digest: str, outcome: Outcome) -> None:
        with self._guard(), self._file as transaction:
            insert = "INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)"
            transaction.execute(insert, (digest, outcome.verdict, outcome.raw))

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise JudgeError(
                f"the cache {self._path} cannot be used ({error}); move it away"
            ) from error


def _summarize(
    episodes: Sequence[Episode],
    verdicts: Mapping[Key, bool | None],
    *,
    predictions: Path,
    settings: Settings,
    reasons: Mapping[str, int],
    warnings: Sequence[str],
    counts: Mapping[str, int],
) -> Summary:
    """All counts; ``counts`` holds those that do not follow from the verdicts."""
    counted = [each for each in episodes if not each.void]
    n = len(counted)
    right = sum(verdicts[each.key] is True for each in counted)
    missing = sum(verdicts[each.key] is None for each in counted)
    said = [verdicts[e.key] for e in counted if e.to_ask and verdicts[e.key] is not None]
    if len(said) >= _ENOUGH and len(set(said)) == 1:
        constant = (
            f"the judge called all {len(said)} predictions {'right' if said[0] else 'wrong'}: a "
            f"constant verdict says nothing of them; look at its answers in {JUDGED}"
        )
        warnings = [*warnings, constant]
    cost = None
    if settings.prices:
        price_in, price_out = settings.prices
        cost = (counts["tokens_in"] * price_in + counts["tokens_out"] * price_out) / 1e6
    return Summary(
        predictions=predictions.name,
        model=settings.model,
        prompt=settings.prompt,
        endpoint=settings.endpoint,
        score=right / n if n and not missing else None,
        range=(right / n, (right + missing) / n) if n else None,
        n=n,
        right=right,
        wrong=n - right - missing,
        missing=missing,
        no_prediction=sum(not each.to_ask for each in counted),
        void=len(episodes) - n,
        reasons=reasons,
        warnings=tuple(warnings),
        cost=cost,
        **counts,
    )


def _write(path: Path, summary: Summary) -> None:
    """Write the summary as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(summary), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[int, bool | None], None]]:
    """Show how many verdicts are there, and how many of these say right, in a terminal."""
    if not (show and total):
        yield lambda count, verdict: None
        return
    said: Counter[bool | None] = Counter()
    with progress("judging", total) as report:

        def advance(count: int, verdict: bool | None) -> None:
            said[verdict] += count
            told = f"{said[True]} right, {said[False]} wrong, {said[None]} missing"
            report(said.total(), told)

        yield advance


def _episode(record: Any, where: str) -> Episode:
    """An episode from a line of ``predictions.jsonl``."""
    info = record.get("info") if isinstance(record, dict) else None
    if not isinstance(info, dict):
        raise DataError(f"{where}: no episode: it has no object 'info'; is it a prediction file?")
    sample = record.get("sample", 0)
    name = info.get("question_id")
    key: str | int | None = str(name) if name not in (None, "") else record.get("episode")
    if not isinstance(key, str | int) or not isinstance(sample, int):
        raise DataError(
            f"{where}: an episode has a number 'sample', and a question_id in 'info' or a number "
            "'episode'"
        )
    void = bool(record.get("void") or info.get("void"))
    question, answers = info.get("question"), info.get("answers")
    prediction = info.get("prediction") or ""
    if not isinstance(prediction, str):
        raise DataError(f"{where}: the prediction must be a text")
    episode = Episode((key, sample), void, str(question or ""), (), prediction)
    if not episode.to_ask:
        return episode
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: the question of {key!r} is missing; a judge needs it")
    if not (isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers)):
        raise DataError(
            f"{where}: the question {key!r} has no gold answers (a list of texts); a judge has "
            "nothing to compare with"
        )
    return replace(episode, answers=tuple(answers))


def _digest(model: str, text: str) -> str:
    """What a verdict is known by: model and full prompt."""
    return hashlib.sha256(json.dumps([model, text]).encode()).hexdigest()


def _foreign(path: Path) -> DataError:
    return DataError(f"{path} is there and was not written by a judge; move it away")
