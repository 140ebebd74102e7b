"""The command ``research-env datasets``, with its subcommands."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg, subcommand

from research_env.commands.shared import named_corpus, print_table
from research_env.errors import ConfigurationError, DataError, DataNotFoundError, UnknownNameError
from research_env.system.terminal import show, show_json


@dataclass(frozen=True)
class ListDatasets:
    """List the data sets, as without a subcommand."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class PrepareDatasets:
    """Fetch published data sets and corpora from the Hugging Face hub, and convert them.

    NAME is musique, hotpotqa, 2wiki, bamboogle, nq, triviaqa or popqa, or a corpus: wiki18 (of
    FlashRAG; 5.1 GB to fetch) or wiki18-search-r1 (Search-R1's). Each gets a folder with
    questions.jsonl.gz, corpus.jsonl.gz, and manifest.json with the checksums of what was fetched
    and made. After an interruption the same command continues with the files that are missing; if
    none is missing, it checks them and changes nothing. Needs pip install 'research-env[hub]';
    HF_ENDPOINT names a mirror. Without a hub it says which files to put where, and then converts
    these.

    For example:
      research-env datasets prepare nq hotpotqa --output ~/data
      RESEARCH_DATA=~/data research-env datasets
      research-env datasets prepare wiki18 --output ~/data
      research-env index --corpus ~/data/wiki18/corpus.jsonl.gz
        --to elasticsearch://localhost:9200/wiki18
    """

    names: Positional[Annotated[tuple[str, ...], arg(metavar="NAME ...")]]
    """What to prepare."""
    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where to make the folders. Default: RESEARCH_DATA, else the cache folder."""
    json: bool = False
    """Print JSON, a line for each."""

    def run(self) -> None:
        """Carry the command out."""
        from research_env.datasets.catalog import HUB_SOURCES  # noqa: PLC0415
        from research_env.datasets.hub import prepare  # noqa: PLC0415
        from research_env.system.paths import cache_folder  # noqa: PLC0415

        if not self.names:
            raise ConfigurationError(f"give the names of data sets: {', '.join(HUB_SOURCES)}")
        for name in self.names:
            if name not in HUB_SOURCES:  # before anything is fetched
                raise UnknownNameError("published data set", name, HUB_SOURCES)
        named = os.environ.get("RESEARCH_DATA")
        default = Path(named).expanduser() if named else cache_folder() / "datasets"
        output = default if self.output is None else self.output.expanduser()
        for name in self.names:
            done = prepare(name, output)
            manifest = done.manifest
            if self.json:
                show_json({"folder": str(done.folder), "made": done.made, **manifest})
                continue
            questions = [f"{n:,} {split}" for split, n in manifest["questions"].items()]
            show(
                f"{name} in {done.folder}: "
                + (f"questions {', '.join(questions)}; " if questions else "")
                + f"{manifest['passages']:,} passages"
                + ("" if done.made else "; it was there already, its checksums hold")
            )
            if done.made:
                show(f"No longer needed: {done.downloads}")
            if not questions:
                show(
                    f"Index it: research-env index --corpus {done.folder}/corpus.jsonl.gz "
                    f"--to elasticsearch://localhost:9200/{name}"
                )
        if output.resolve() != default.resolve():
            show(f"To use it: export RESEARCH_DATA={output.resolve()}", file=sys.stderr)


@dataclass(frozen=True)
class ConvertDatasets:
    """Convert your own questions and passages to the format of this package, and check them.

    FILE is a question file or a corpus: .jsonl, .csv, .tsv (each also .gz), .parquet or .arrow; or
    a folder in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv). Questions have id (or
    _id), question, and answers (or golden_answers, answer); passages have id (or _id), title (may
    be missing) and text (or FlashRAG's contents). Other fields of questions are kept for rewards.
    Environments read these files without conversion too; converted ones open faster.

    For example:
      research-env datasets convert dev.parquet wiki.tsv --output data/mine
      research-env datasets convert beir/hotpotqa --output data/hotpotqa-beir
    """

    sources: Positional[Annotated[tuple[Path, ...], arg(metavar="FILE ...")]]
    """What to convert."""
    output: Annotated[Path, arg(metavar="DIR")]
    """Folder that gets questions.jsonl and corpus.jsonl."""
    json: bool = False
    """Print JSON, a line for each."""

    def run(self) -> None:
        """Carry the command out."""
        from research_env.datasets.convert import convert  # noqa: PLC0415

        if not self.sources:
            raise ConfigurationError("give the files to convert, such as dev.parquet wiki.tsv")
        for source in self.sources:
            done = convert(source, self.output)
            if self.json:
                show_json({"source": str(source), **asdict(done)})
                continue
            for split, count in done.questions.items():
                named = f" of split {split}" if split else ""
                show(f"{count:,} questions{named} in {self.output / 'questions.jsonl'}")
            if done.passages:
                show(f"{done.passages:,} passages in {self.output / 'corpus.jsonl'}")
            if done.left_out:
                show(f"Left out: {done.left_out:,} queries without answers", file=sys.stderr)


@dataclass(frozen=True)
class Datasets:
    """List the data sets, where they are, and how many questions each split has.

    The subcommand prepare fetches published ones, convert reads your own.

    For example:
      research-env datasets
      RESEARCH_DATA=~/data research-env datasets --json
      research-env datasets prepare nq hotpotqa --output ~/data
      research-env datasets convert dev.parquet wiki.tsv --output data/mine
    """

    json: bool = False
    """Print JSON."""
    action: (
        Annotated[ListDatasets, subcommand("list")]
        | Annotated[PrepareDatasets, subcommand("prepare")]
        | Annotated[ConvertDatasets, subcommand("convert")]
    ) = ListDatasets()
    """What to do."""

    def run(self) -> None:
        """Carry the command out."""
        if not isinstance(self.action, ListDatasets):
            self.action.run()
            return
        from research_env.datasets import miniworld  # noqa: PLC0415
        from research_env.datasets.catalog import PUBLISHED  # noqa: PLC0415

        rows: list[dict[str, Any]] = [
            {
                "name": "miniworld",
                "found": "bundled",
                "splits": dict(miniworld.SPLITS),
                "passages": len(list(named_corpus("miniworld", None))),
            }
        ]
        rows += [_described(name, published.splits) for name, published in PUBLISHED.items()]
        if self.json or self.action.json:
            show_json(rows)
            return
        title = "RESEARCH_DATA is not set"
        missing = "not here: set RESEARCH_DATA, or the hub is asked"
        if where := os.environ.get("RESEARCH_DATA"):
            is_folder = Path(where).expanduser().is_dir()
            title = f"RESEARCH_DATA is {where}" + ("" if is_folder else ", which is no folder")
            missing = "not in RESEARCH_DATA; the hub is asked"
        print_table(
            title,
            ("data set", "questions", "passages", "found in"),
            [
                (
                    row["name"],
                    ", ".join(f"{split} {count:,}" for split, count in row["splits"].items()),
                    "" if row["passages"] is None else f"{row['passages']:,}",
                    row.get("problem") or row["found"] or missing,
                )
                for row in rows
            ],
        )
        show("Your own: dataset='custom', questions=PATH, corpus=PATH (SearchQA-v0)")


def _described(name: str, splits: Iterable[str]) -> dict[str, Any]:
    """What is here of a published data set; ``problem`` says why it cannot be read."""
    from research_env.datasets import load  # noqa: PLC0415

    row: dict[str, Any] = {"name": name, "found": None, "splits": {}, "passages": None}
    folder = load.local_folder(name)
    if folder is None:
        return row
    row["found"], corpus = str(folder), None
    try:
        for split in splits:
            try:
                data = load.load_dataset(name, split=split)
            except (DataNotFoundError, ConfigurationError):  # a set of some splits only
                row["splits"][split] = 0
                continue
            row["splits"][split] = len(data.questions)
            corpus = corpus or data.corpus
        row["passages"] = sum(1 for _ in corpus) if corpus is not None else 0
    except DataError as error:
        row["problem"] = str(error)
    return row
