"""Judge a prediction file and summarize it; continue where an earlier run stopped.

Every episode that is not void is in the denominator. One without a prediction is incorrect, and
nobody is asked. One whose verdict is missing makes the score a range.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from research_env.errors import ConfigurationError, UnknownNameError
from research_env.judge.predictions import EpisodeKey, JudgedEpisode, read_predictions
from research_env.judge.prompts import JUDGE_PROMPTS
from research_env.judge.verdicts import (
    JudgeError,
    Verdict,
    VerdictCache,
    VerdictLog,
    open_verdict_log,
)
from research_env.retrieval.url import check_address
from research_env.system.progress import progress
from research_env.system.redaction import one_line, redact

PREDICTIONS = "predictions.jsonl"
JUDGED = "judged.jsonl"
SUMMARY = "judge.json"
CACHE = "judge-cache.sqlite"

MIN_FOR_CONSTANT = 20
"""Fewest verdicts, all equal, after which the summary warns that the judge is constant."""

MAX_CONSECUTIVE_FAILURES = 8
"""Questions in a row without a reply after which the run ends; ``concurrency`` if that is more."""


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """Which judge to ask, and how.

    Args:
        endpoint: address of an OpenAI-compatible server, such as ``http://localhost:8000/v1``.
        model: the model's name at the server.
        prompt: ``research`` or ``r1-searcher``.
        key: the server's key; ``OPENAI_API_KEY``.
        concurrency: questions that are asked at the same time.
        rate: requests per second, retries not counted; None: any number.
        deadline: seconds per request with all its retries.
        prices: price per million tokens in and out; None: cost is not counted.

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
    deadline: float = 120.0
    prices: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint, self.key)
        if self.prompt not in JUDGE_PROMPTS:
            raise UnknownNameError("prompt of a judge", self.prompt, JUDGE_PROMPTS)
        if not self.model.strip():
            raise ConfigurationError("--model is empty; give the model's name at the server")
        if self.concurrency < 1:
            raise ConfigurationError(f"--concurrency {self.concurrency} must be 1 or more")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ConfigurationError(f"--rate {self.rate} must be more than 0")
        if not 0 < self.deadline < float("inf"):
            raise ConfigurationError(f"--deadline {self.deadline} must be more than 0")
        if self.prices and not all(0 <= price < float("inf") for price in self.prices):
            raise ConfigurationError("--price-in and --price-out must be 0 or more")


@dataclass(frozen=True, slots=True)
class JudgeSummary:
    """The content of ``judge.json``.

    The counts from ``replies`` on, and the cost, are sums over all runs of this ``judged.jsonl``.

    Attributes:
        predictions: name of the prediction file.
        model: the judge's name at the server.
        prompt: ``research`` or ``r1-searcher``.
        endpoint: the server's address.
        score: ``correct / n``; None while verdicts are missing.
        range: the score if all missing verdicts were incorrect, and if all were correct.
        n: episodes in the denominator, ``correct + incorrect + missing``.
        correct: episodes whose verdict is correct.
        incorrect: episodes whose verdict is incorrect, or that have no prediction.
        missing: episodes without a verdict.
        no_prediction: episodes without a prediction, which are part of ``incorrect``.
        void: episodes in which the infrastructure failed; they are not in ``n``.
        reasons: how many verdicts are missing, per reason.
        warnings: for example that all verdicts are equal.
        asked: prompts that this run asked; samples that share a prompt count once.
        from_cache: episodes whose verdict this run took from the cache.
        kept: episodes whose verdict was in ``judged.jsonl`` before this run.
        replies: answers of the judge.
        replies_without_usage: answers for which the server counted no tokens.
        tokens_in: tokens of the prompts.
        tokens_out: tokens of the answers.
        cost: price of the tokens in the unit of ``prices``; None without prices.
    """

    predictions: str
    model: str
    prompt: str
    endpoint: str
    score: float | None
    range: tuple[float, float] | None
    n: int
    correct: int
    incorrect: int
    missing: int
    no_prediction: int
    void: int
    reasons: Mapping[str, int]
    warnings: tuple[str, ...]
    asked: int
    from_cache: int
    kept: int
    replies: int
    replies_without_usage: int
    tokens_in: int
    tokens_out: int
    cost: float | None


def judge_predictions(
    predictions: Path, settings: JudgeSettings, output: Path | None = None
) -> JudgeSummary:
    """Have every prediction judged; continue where an earlier run stopped.

    Writes ``judged.jsonl`` (a line per verdict, as they come) and, however it ends, ``judge.json``
    into ``output``, and keeps the verdicts in ``judge-cache.sqlite`` beside the predictions. The
    next run asks for missing verdicts again. Call it outside of a running event loop.

    Args:
        predictions: see :func:`read_predictions`; or the folder that holds a ``predictions.jsonl``.
        settings: the judge, and how to ask it.
        output: folder to write to; None: the predictions' folder.

    Raises:
        DataError: a file that cannot be read.
        ConfigurationError: ``judged.jsonl`` is of another judge, or another run writes it.
        JudgeError: the endpoint is not there, or refuses every question.
    """
    if predictions.is_dir():
        predictions /= PREDICTIONS
    episodes, warnings = read_predictions(predictions)
    prompt = JUDGE_PROMPTS[settings.prompt]
    texts = {
        e.key: prompt.text(e.question, e.answers, e.prediction) for e in episodes if e.needs_judge
    }
    digests = {  # a verdict depends on the model and the whole prompt
        key: hashlib.sha256(json.dumps([settings.model, text]).encode()).hexdigest()
        for key, text in texts.items()
    }
    output = output or predictions.parent
    output.mkdir(parents=True, exist_ok=True)
    header = {
        "model": settings.model,
        "prompt": settings.prompt,
        "predictions": os.path.relpath(predictions, output),
    }
    with (
        open_verdict_log(output / JUDGED, header) as log,
        closing(VerdictCache(predictions.parent / CACHE)) as cache,
    ):
        waiting, counts = _reuse_verdicts(episodes, digests, log, cache)
        problems = {key: "not asked" for keys in waiting.values() for key in keys}
        given: Counter[bool | None] = Counter()
        try:
            with progress("judging", len(problems)) as report:

                def finished(digest: str, verdict: Verdict) -> None:
                    counts["asked"] += 1
                    if verdict.correct is not None:
                        cache.put(digest, verdict)
                    for key in waiting[digest]:
                        log.write(key, digest, verdict)
                        problems[key] = verdict.problem.kind if verdict.problem else ""
                        given[verdict.correct] += 1
                        verdict = replace(verdict, replies=())  # their cost counts once
                    told = f"{given[True]} correct, {given[False]} incorrect, {given[None]} missing"
                    report(given.total(), told)

                questions = {digest: texts[keys[0]] for digest, keys in waiting.items()}
                if questions:
                    asyncio.run(_ask_all(questions, settings, finished))
        finally:
            verdicts = {e.key: log.verdict(e.key, digests.get(e.key)) for e in episodes}
            reasons = Counter(problems[key] for key in problems if verdicts[key] is None)
            summary = _summarize(
                episodes,
                verdicts,
                predictions=predictions,
                settings=settings,
                reasons=dict(reasons),
                warnings=warnings,
                counts={**counts, **log.totals},
            )
            _write_atomic(output / SUMMARY, json.dumps(asdict(summary), indent=1) + "\n")
    return summary


def format_summary(summary: JudgeSummary) -> str:
    """Describe a summary in a few lines for people, without control characters."""
    s = summary
    lines = []
    if s.range is None:
        lines.append("no score: every episode is void")
    elif s.score is not None:
        lines.append(f"score {s.score:.2%}: {s.correct:,} of {s.n:,} correct")
    else:
        low, high = s.range
        lines.append(
            f"score between {low:.2%} and {high:.2%}: {s.missing:,} of {s.n:,} verdicts are missing"
        )
        why = ", ".join(f"{count:,} {kind}" for kind, count in s.reasons.items())
        lines.append(f"missing: {why}; the same command asks for them again")
    lines.append(
        f"{s.correct:,} correct, {s.incorrect:,} incorrect; {s.no_prediction:,} of these have no "
        "prediction, which is incorrect without asking"
    )
    if s.void:
        lines.append(f"{s.void:,} void episodes (failed infrastructure) are not counted")
    lines.append(
        f"asked {s.asked:,} now, {s.from_cache:,} from the cache, {s.kept:,} kept from before"
    )
    cost = "" if s.cost is None else f"; cost {s.cost:,.4f}"
    unknown = f" ({s.replies_without_usage:,} not counted)" if s.replies_without_usage else ""
    lines.append(
        f"{s.replies:,} replies of {s.model} in all{unknown}: {s.tokens_in:,} tokens in, "
        f"{s.tokens_out:,} out{cost}"
    )
    return "\n".join(one_line(line, 1_000) for line in lines)


def check_endpoint(url: str, key: str = "") -> None:
    """Refuse an address that is not a server's, or that may hold a secret.

    Raises:
        ConfigurationError: the address cannot be used; the message does not repeat a secret.
    """
    if "?" in url or "#" in url or redact(url, key) != url:
        raise ConfigurationError(
            "the address of an endpoint holds no key, and ends before its '?'; a key goes into "
            "OPENAI_API_KEY"
        )
    check_address(url, "http://localhost:8000/v1")


def _reuse_verdicts(
    episodes: Sequence[JudgedEpisode],
    digests: Mapping[EpisodeKey, str],
    log: VerdictLog,
    cache: VerdictCache,
) -> tuple[dict[str, list[EpisodeKey]], Counter[str]]:
    """Write the verdicts that need no judge to the log.

    Args:
        episodes: all episodes.
        digests: the digest of each prompt that a judge would be asked.
        log: the verdicts of earlier runs with this output.
        cache: the verdicts of all runs on these predictions.

    Returns:
        The episodes that wait for the verdict on each digest, and how many verdicts were kept from
        the log and came from the cache.
    """
    counts = Counter(asked=0, from_cache=0, kept=0)
    waiting: dict[str, list[EpisodeKey]] = {}
    for each in episodes:
        digest = digests.get(each.key)
        if each.void:
            continue
        if log.verdict(each.key, digest) is not None:
            counts["kept"] += each.needs_judge
        elif digest is None:
            log.write(each.key, None, Verdict(False))
        elif found := cache.get(digest):
            log.write(each.key, digest, found)
            counts["from_cache"] += 1
        else:
            waiting.setdefault(digest, []).append(each.key)
    return waiting, counts


async def _ask_all(
    questions: Mapping[str, str],
    settings: JudgeSettings,
    finished: Callable[[str, Verdict], None],
) -> None:
    """Ask every prompt, and call ``finished`` with each digest and its verdict.

    Args:
        questions: the prompt of each digest.
        settings: the judge, and how to ask it.
        finished: called once per digest, in the order of the answers.

    Raises:
        JudgeError: the server refuses every question, or too many in a row get no answer.
    """
    from research_env.judge.client import JudgeClient, ask_verdict  # noqa: PLC0415 - an extra

    prompt = JUDGE_PROMPTS[settings.prompt]
    pending = iter(questions.items())
    limit = max(MAX_CONSECUTIVE_FAILURES, settings.concurrency)
    failures, answered = 0, False

    async def work(client: JudgeClient) -> None:
        nonlocal failures, answered
        for digest, text in pending:  # one iterator for all workers
            verdict = await ask_verdict(client, prompt, text)
            finished(digest, verdict)
            answered = answered or bool(verdict.replies)
            refused = verdict.problem is not None and verdict.problem.refused
            failures = failures + 1 if not verdict.replies and not (refused and answered) else 0
            if failures == limit:
                raise JudgeError(
                    f"{failures} questions in a row without an answer: {verdict.problem}"
                )

    client = JudgeClient(
        settings.endpoint,
        settings.model,
        key=settings.key,
        formats=prompt.formats,
        connections=settings.concurrency,
        rate=settings.rate,
        deadline=settings.deadline,
    )
    try:
        async with client, asyncio.TaskGroup() as group:
            for _ in range(min(settings.concurrency, len(questions))):
                group.create_task(work(client))
    except ExceptionGroup as several:
        raise several.exceptions[0] from None


def _summarize(
    episodes: Sequence[JudgedEpisode],
    verdicts: Mapping[EpisodeKey, bool | None],
    *,
    predictions: Path,
    settings: JudgeSettings,
    reasons: Mapping[str, int],
    warnings: Sequence[str],
    counts: Mapping[str, int],
) -> JudgeSummary:
    """Count verdicts; ``counts`` are the fields of the summary that do not follow from them."""
    counted = [each for each in episodes if not each.void]
    n = len(counted)
    correct = sum(verdicts[each.key] is True for each in counted)
    missing = sum(verdicts[each.key] is None for each in counted)
    given = [verdicts[e.key] for e in counted if e.needs_judge and verdicts[e.key] is not None]
    if len(given) >= MIN_FOR_CONSTANT and len(set(given)) == 1:
        constant = (
            f"the judge called all {len(given)} predictions "
            f"{'correct' if given[0] else 'incorrect'}: a constant verdict says nothing about "
            f"them; look at its answers in {JUDGED}"
        )
        warnings = [*warnings, constant]
    cost = None
    if settings.prices:
        price_in, price_out = settings.prices
        cost = (counts["tokens_in"] * price_in + counts["tokens_out"] * price_out) / 1e6
    return JudgeSummary(
        predictions=predictions.name,
        model=settings.model,
        prompt=settings.prompt,
        endpoint=settings.endpoint,
        score=correct / n if n and not missing else None,
        range=(correct / n, (correct + missing) / n) if n else None,
        n=n,
        correct=correct,
        incorrect=n - correct - missing,
        missing=missing,
        no_prediction=sum(not each.needs_judge for each in counted),
        void=len(episodes) - n,
        reasons=reasons,
        warnings=tuple(warnings),
        cost=cost,
        **counts,
    )


def _write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
