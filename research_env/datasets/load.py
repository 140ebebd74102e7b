"""Data sets by name: the bundled world, the published sets, a user's own files, and mixtures."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from research_env.datasets.base import Corpus, Dataset, Question
from research_env.datasets.catalog import PUBLISHED
from research_env.datasets.files import FileCorpus, is_beir, read_questions
from research_env.datasets.formats import read_records
from research_env.errors import (
    ConfigurationError,
    DataError,
    DataNotFoundError,
    UnknownNameError,
)
from research_env.metrics import LANGUAGES, Normalizer, normalize
from research_env.retrieval.base import Passage
from research_env.system.paths import cache_folder

log = logging.getLogger(__name__)
Part = tuple[str, int | None]  # name and weight

_SLICE = re.compile(r"(?P<split>[^\[\]]+)\[(?P<first>\d+%?)?:(?P<last>\d+%?)?\]", re.ASCII)

DATASETS = ("miniworld", *PUBLISHED, "custom")
"""The names that :func:`load_dataset` takes."""


def load_dataset(
    name: str,
    *,
    split: str,
    hops: int | Collection[int] | None = None,
    questions: str | Path | None = None,
    corpus: str | Path | None = None,
    world_seed: int = 0,
    difficulty: int = 0,
    grades: str | Path | None = None,
    grade: str | None = None,
    metric_language: str | None = None,
) -> Dataset:
    """Load the questions of a split, and the corpus that answers them.

    The published sets come from the folder that the environment variable ``RESEARCH_DATA`` names,
    which holds for each set a folder with ``questions.jsonl``, ``corpus.jsonl`` and, for questions
    without gold passages, ``qa_train.jsonl`` and ``qa_dev.jsonl``, each plain or gzipped; else from
    the Hugging Face hub, once, into the cache folder. They have these splits:

    - ``train``: all training questions that are available; ``train-gold``: only questions whose
      gold passages are known and in the corpus.
    - ``dev``: the development questions with gold passages in the corpus; ``dev-all``: all of them.
    - ``test``: the only split of Bamboogle and PopQA; NQ and TriviaQA have ``train`` and ``dev``
      too. These four have no corpus.
    - ``stage-1``, ``stage-2``: R1-Searcher's training questions (``data/training_set`` of
      RUCAIBox/R1-Searcher, in the folder ``r1searcher_train``), without a corpus.

    ``"train[:50%]"`` and ``"train[50%:]"`` are the two halves of a split, as in the ``datasets``
    library, and ``"dev[100:200]"`` are the questions 100 to 199, before any other choice. Numbers
    are not negative.

    Gold answers that normalize to nothing, such as "$", are dropped, since every answer made of
    punctuation would match them exactly. A question that has no other answer is left out; the
    number of both is logged as a warning.

    A mixture names several sets: ``"musique+hotpotqa"`` has all questions of both.
    ``"musique:2+hotpotqa:1"`` has two of the first for each of the second, spread evenly over each
    set and as many as possible without repeating one. Its questions are interleaved in a fixed
    order, and its corpus is the union.

    Args:
        name: one of :data:`DATASETS`, or a mixture of them.
        split: as above; "train" or "dev" for MiniWorld. A user's own questions belong to the split
            that they name, or to every split if they name none.
        hops: keep the questions with this number of hops, or with one of these numbers.
        questions: path of a question file; ``custom`` needs one, other sets have their own.
        corpus: path of a corpus to use instead of the set's own.
        world_seed: the seed of MiniWorld's world.
        difficulty: difficulty of MiniWorld, from 0 to 5.
        grades: a file written by ``research-agent grade``: ``{"question_id", "grade", ...}`` lines.
        grade: keep the questions with this grade. Grades are mixed as data sets are:
            ``"medium+hard"`` keeps all of both, ``"medium:1+hard:2"`` twice as many hard ones.
        metric_language: the language by whose rules all answers are normalized; None: each
            question's own field ``metric_language``, or English.

    Raises:
        UnknownNameError: no such data set, split or language; the message lists those that exist.
        ConfigurationError: settings that do not fit together, or leave no question.
        DataNotFoundError: the data are neither in a folder nor on a hub that answers.
        DataError: a file is damaged or malformed; the message names file and line.
    """
    if not isinstance(name, str):
        raise UnknownNameError("data set", name, DATASETS)
    if not isinstance(split, str):
        raise ConfigurationError(f"split is a name such as 'dev', not {split!r}")
    for what, path in (("questions", questions), ("corpus", corpus)):
        if path is not None and not isinstance(path, str | Path):
            raise ConfigurationError(f"{what} is the path of a file, not {path!r}")
    if corpus is not None and not (Path(corpus).is_file() or is_beir(Path(corpus))):
        raise DataNotFoundError(f"no corpus file {str(corpus)!r}; give a .jsonl or .jsonl.gz file")
    if metric_language not in (None, *LANGUAGES):
        raise UnknownNameError("metric_language", metric_language, LANGUAGES)
    parts = [_parse_part(part) for part in name.split("+")]
    names = [part for part, _ in parts]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"the mixture {name!r} names a data set twice; use a weight")
    if questions is not None and names != ["custom"]:
        raise ConfigurationError(
            f"questions={str(questions)!r} goes with dataset='custom', not with {name!r}"
        )
    loaded = []
    for part in names:
        whole = _load(part, split, questions, world_seed, difficulty)
        loaded.append(_with_hops(_answerable(whole, metric_language), split, hops))
    data = loaded[0] if len(loaded) == 1 else _mixture(name, loaded, [w for _, w in parts])
    if corpus is not None:
        data = replace(data, corpus=FileCorpus(Path(corpus).name, Path(corpus)))
    if (grades is None) != (grade is None):
        raise ConfigurationError(
            f"grades=FILE and grade=NAME go together, not {grades!r} and {grade!r}; "
            "research-agent grade makes such a file"
        )
    return data if grades is None else _graded(data, Path(grades), str(grade))


def data_folder(name: str) -> Path:
    """The folder of a published data set, fetched from the hub if it is not there.

    Raises:
        DataNotFoundError: the data are neither in a folder nor on a hub that answers.
    """
    found = local_folder(name)
    if found is not None:
        return found
    from research_env.datasets.hub import prepare  # noqa: PLC0415  (once for each data set)

    folder, (stems, _) = PUBLISHED[name].folder, next(iter(PUBLISHED[name].splits.values()))
    try:
        return prepare(name, cache_folder() / "datasets").folder
    except (DataNotFoundError, UnknownNameError) as error:  # not every set is on the hub
        named = os.environ.get("RESEARCH_DATA")
        otherwise = f"give this machine access to the hub ({error})"
        if isinstance(error, UnknownNameError):
            otherwise = "make it as docs/how-to/data.md says: the hub does not have it in this form"
        place = f"{Path(named) / folder} is no such folder" if named else "it is not set"
        raise DataNotFoundError(
            f"the data set {name!r} is not at hand. Set the environment variable RESEARCH_DATA to "
            f"a folder that holds {folder}/{stems[-1]}.jsonl ({place}), or {otherwise}. "
            "dataset='miniworld' needs neither"
        ) from error


def local_folder(name: str) -> Path | None:
    """The folder of a published data set in ``RESEARCH_DATA`` or the cache, if it is there."""
    published = PUBLISHED[name]
    # Any of these files shows that the set is there; files that come before them are optional.
    needed = {stems[-1] for stems, _ in published.splits.values()}
    places = [cache_folder() / "datasets" / published.folder]
    if named := os.environ.get("RESEARCH_DATA"):
        places.insert(0, Path(named).expanduser() / published.folder)
    return next((p for p in places if any(_file(p, stem) for stem in needed)), None)


def _parse_part(
    text: str,
    what: str = "data set",
    known: Collection[str] = DATASETS,
    example: str = "musique:2+hotpotqa:1",
) -> Part:
    """Split one part of a mixture, such as ``musique:2``, into its name and weight."""
    name, colon, weight = text.strip().partition(":")
    name = {"2wikimultihopqa": "2wiki"}.get(name, name)
    if name not in known:
        hint = f"Join several with '+', for example {example!r}."
        raise UnknownNameError(what, name, known, hint)
    if not colon:
        return name, None
    if not (weight.isascii() and weight.isdigit() and int(weight) > 0):
        raise ConfigurationError(
            f"the weight in {text!r} must be a whole number from 1 on, as in {example!r}"
        )
    return name, int(weight)


def _load(
    name: str, split: str, questions: str | Path | None, world_seed: int, difficulty: int
) -> Dataset:
    """The questions of a split or a slice of one, and their corpus."""
    sliced = _SLICE.fullmatch(split)
    if sliced is None:
        return _load_split(name, split, questions, world_seed, difficulty)
    whole = _load_split(name, sliced["split"], questions, world_seed, difficulty)
    count = len(whole.questions)
    first, last = (
        int(end.rstrip("%")) * (count if end.endswith("%") else 100) // 100
        for end in (sliced["first"] or "0", sliced["last"] or "100%")
    )
    kept = whole.questions[first:last]
    if not kept:
        raise ConfigurationError(f"{split!r} has no question; {whole.name!r} has {count} there")
    return replace(whole, questions=kept)


def _load_split(
    name: str, split: str, questions: str | Path | None, world_seed: int, difficulty: int
) -> Dataset:
    if name == "miniworld":
        from research_env.datasets import miniworld_hard  # noqa: PLC0415

        return miniworld_hard.load(split, world_seed, difficulty)
    if name == "custom":
        if questions is None:
            raise ConfigurationError("dataset='custom' needs questions=PATH, a .jsonl file")
        everything = read_questions(questions)
        chosen = [question for question in everything if question.split in (None, split)]
        if not chosen or "[" in split:  # what is no slice is no name either
            known = {str(question.split) for question in everything}
            raise UnknownNameError(f"split of {questions}", split, known)
        return Dataset("custom", chosen, None)
    published = PUBLISHED[name]
    if split not in published.splits:
        raise UnknownNameError(f"split of {name}", split, published.splits)
    folder = data_folder(name)
    stems, label = published.splits[split]
    file = next((path for path in (_file(folder, stem) for stem in stems) if path), None)
    if file is None:
        raise DataNotFoundError(f"{folder} holds no file {stems[0]}.jsonl or {stems[0]}.jsonl.gz")
    corpus = _file(folder, "corpus")
    return Dataset(
        name,
        [question for question in read_questions(file) if question.split == label],
        FileCorpus(name, corpus) if corpus else None,
    )


def _file(folder: Path, stem: str) -> Path | None:
    paths = (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz")
    return next((path for path in paths if path.is_file()), None)


def _answerable(data: Dataset, language: str | None) -> Dataset:
    """Drop gold answers that normalize to nothing, and questions that then have none."""
    kept, left_out, dropped = [], [], 0
    for question in data.questions:
        answers = tuple(filter(_normalizer(question, language), question.answers))
        missing = len(question.answers) - len(answers)
        dropped += missing
        if answers:
            kept.append(replace(question, answers=answers) if missing else question)
        else:
            left_out.append(f"{question.id!r} {question.answers}")
    if not dropped:
        return data
    message = f"{data.name}: dropped {dropped} gold answers that normalize to nothing"
    if left_out:
        message += f", and left out {len(left_out)} questions without another: {left_out[0]}"
        message += ", ..." if len(left_out) > 1 else ""
    log.warning(message)
    if not kept:
        raise DataError(f"no question is left. {message}")
    return replace(data, questions=kept)


def _normalizer(question: Question, language: str | None) -> Normalizer:
    """How a question's answers are normalized; an unknown language is refused where it is used."""
    language = language or question.extra.get("metric_language")
    rules = LANGUAGES.get(language) if isinstance(language, str) else None
    return rules.normalize if rules else normalize


def _with_hops(data: Dataset, split: str, hops: int | Collection[int] | None) -> Dataset:
    """Keep the questions with one of these numbers of hops; None keeps all."""
    wanted = None if hops is None else list(hops) if isinstance(hops, Collection) else [hops]
    if wanted is not None and not all(type(number) is int for number in wanted):
        raise ConfigurationError(f"hops is a number, or a list of numbers, not {hops!r}")
    chosen = [q for q in data.questions if wanted is None or q.hops in wanted]
    if not chosen:
        counts = Counter("unknown" if q.hops is None else str(q.hops) for q in data.questions)
        known = ", ".join(f"{number}: {count}" for number, count in sorted(counts.items()))
        raise ConfigurationError(
            f"no question of {data.name!r}, split {split!r}, has hops={hops!r}; "
            f"questions by number of hops: {known or 'none'}"
        )
    return replace(data, questions=chosen)


def _graded(data: Dataset, path: Path, grade: str) -> Dataset:
    """Keep the questions that a file of grades gives this grade; drop those it does not name."""
    if not path.is_file():
        raise DataNotFoundError(f"no file of grades {str(path)!r}; research-agent grade makes one")
    graded: dict[str, str] = {}
    for where, record in read_records(path):
        if not {"question_id", "grade"} <= record.keys():
            raise DataError(
                f'{where}: not {{"question_id": ..., "grade": ...}}, but {dict(record)!r:.80}; '
                "mend it"
            )
        graded[str(record["question_id"])] = str(record["grade"])
    counts = Counter(graded.values())
    known = {"easy", "medium", "hard", *counts}
    parts = [_parse_part(part, "grade", known, "medium:1+hard:2") for part in grade.split("+")]
    for name, _ in parts:
        if name not in counts:
            found = ", ".join(f"{each} {count}" for each, count in counts.items())
            raise ConfigurationError(
                f"no question in {path} is {name} ({found or 'the file is empty'}); give another "
                "grade, or several, such as 'medium:1+hard:2'"
            )
    chosen = [
        replace(data, questions=[q for q in data.questions if graded.get(q.id) == name])
        for name, _ in parts
    ]
    if not all(part.questions for part in chosen):
        raise ConfigurationError(
            f"no question of {data.name!r} has each of the grades {grade!r} in {path}; were they "
            "made for this data set and split?"
        )
    if len(chosen) == 1:
        return chosen[0]
    return replace(data, questions=_mixture(grade, chosen, [w for _, w in parts]).questions)


@dataclass(frozen=True, slots=True)
class UnionCorpus:
    """Several corpora, one after the other."""

    name: str
    parts: tuple[Corpus, ...]

    def __iter__(self) -> Iterator[Passage]:
        for part in self.parts:
            yield from part

    def fingerprint(self) -> str:
        """Hex digest of the fingerprints of the parts."""
        text = "\n".join(part.fingerprint() for part in self.parts)
        return hashlib.sha256(text.encode()).hexdigest()


def _mixture(name: str, parts: Sequence[Dataset], weights: Sequence[int | None]) -> Dataset:
    """Interleave the questions of several data sets; without a weight each has all of its own."""
    sizes = [len(part.questions) for part in parts]
    if any(weight is not None for weight in weights):
        shares = [weight or 1 for weight in weights]
        rounds = min(size // share for size, share in zip(sizes, shares, strict=True))
        if not rounds:
            raise ConfigurationError(
                f"the mixture {name!r} needs more questions than there are: {sizes}"
            )
        sizes = [share * rounds for share in shares]
    # The j-th of a part's n questions stands at (j + 1/2)/n of the whole.
    order = sorted(
        ((j + 0.5) / size, part, j) for part, size in enumerate(sizes) for j in range(size)
    )
    questions = [
        parts[part].questions[j * len(parts[part].questions) // sizes[part]] for _, part, j in order
    ]
    repeated = [id_ for id_, count in Counter(q.id for q in questions).items() if count > 1]
    if repeated:
        raise DataError(f"the parts of {name!r} share the id {repeated[0]!r}; ids must be unique")
    corpora = tuple(part.corpus for part in parts if part.corpus is not None)
    union: Corpus | None = UnionCorpus(name, corpora) if len(corpora) > 1 else None
    return Dataset(name, questions, corpora[0] if len(corpora) == 1 else union)
