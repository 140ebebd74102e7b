r"""The papers' table: every method on every data set, with the papers' numbers beside ours.

    python -m benchmarks.paper_table --models Qwen/Qwen2.5-7B-Instruct \
        --trained ReSearch-Qwen-7B-Instruct=agentrl/ReSearch-Qwen-7B-Instruct \
        --retriever elasticsearch://localhost:9200/wiki18
    python -m benchmarks.paper_table --mini

A cell is a folder, ``OUTPUT/MODEL/METHOD/DATASET``, with ``predictions.jsonl`` and
``summary.json``, as ``research-agent eval`` writes them. The same command continues one that was
stopped; a cell that is there is reused if its model, data, index and settings are the same, and
refused otherwise. Several commands may fill different cells of one output at the same time. Where
``research-env judge`` has put a ``judge.json`` into a cell, its column is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import tyro
from rich.console import Console

from benchmarks.baselines import (
    driver,
    ircot,
    iter_retgen,
    miniature,
    naive_generation,
    naive_rag,
    rendering,
)
from benchmarks.baselines.published import DATASETS, published
from benchmarks.baselines.rendering import Cell, Results, Row, read_judge
from benchmarks.baselines.sampler import Sampler
from benchmarks.runs import run_all
from research_agent.config import EnvironmentConfig, EvalConfig, PolicyConfig, SamplingConfig
from research_agent.config_checks import validate_eval
from research_agent.errors import ConfigError, ResearchAgentError
from research_agent.system.files import write_atomic
from research_agent.trajectory import Trajectory
from research_env.errors import ResearchEnvError

Player = Callable[..., Sequence[Trajectory]]
Format = Literal["terminal", "markdown", "latex", "json"]

LABELS = {
    "naive_generation": "Naive Generation",
    "naive_rag": "Naive RAG",
    "iter_retgen": "Iter-RetGen",
    "ircot": "IRCoT",
    "search_agent": "Search agent, zero-shot",
}
BASELINES: Mapping[str, driver.Baseline] = {
    "naive_generation": naive_generation.play,
    "naive_rag": naive_rag.play,
    "iter_retgen": iter_retgen.play,
    "ircot": ircot.play,
}
MINIATURE: Mapping[str, driver.Baseline] = {
    "naive_generation": partial(naive_generation.play, prompt=miniature.guess),
    "naive_rag": partial(naive_rag.play, prompt=miniature.read),
    "iter_retgen": partial(iter_retgen.play, prompt=miniature.read),
    "ircot": partial(ircot.play, prompt=miniature.think),
}
ENV = "research_env:SearchQA-v0"
SAMPLING = SamplingConfig(temperature=0.0, max_prompt=8192)
SLOTS = 64  # questions played at the same time, unless --max-in-flight says otherwise


@dataclass(frozen=True)
class TableConfig:
    """Run the baselines and trained models of the papers' tables, and print the table.

    A model is [LABEL=]MODEL, a folder or a name on the hub, or [LABEL=]NAME@URL, as an
    OpenAI-compatible endpoint knows it (up to /v1; its key is read from OPENAI_API_KEY). One whose
    label or name says "instruct" or "chat" is prompted through its chat template, any other with
    plain text.
    """

    models: tuple[str, ...] = ()
    """Models that every method is played with."""
    trained: tuple[str, ...] = ()
    """Models that were trained to search. A label such as ReSearch-Qwen-7B puts the paper's numbers
    of that name beside it."""
    datasets: tuple[str, ...] = tuple(DATASETS)
    """Data sets."""
    methods: tuple[str, ...] = tuple(LABELS)
    """What is played with the models."""
    paper: Literal["7b", "32b"] = "7b"
    """Which of ReSearch's tables stands beside ours."""
    retriever: str | None = None
    """Search engine for all, with {dataset} where a data set's name belongs, such as
    elasticsearch://localhost:9200/{dataset}; none takes each data set's own corpus."""
    split: str | None = None
    """Split of the data sets. None takes all development questions where there is a --retriever,
    those with gold passages where there is none, and the test questions of Bamboogle."""
    top_k: int = 5
    """Passages per search, for every method."""
    limit: int | None = None
    """Questions per cell."""
    seed: int = 0
    """Order of the questions, and sampled tokens."""
    sampling: Annotated[SamplingConfig, tyro.conf.OmitArgPrefixes] = SAMPLING
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of the weights."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    workers: int | None = None
    """Cells played at the same time, each in a process with a model of its own and one thread; none
    is 1, and 2 with --mini."""
    output: Path = Path("runs/paper-table")
    """Folder of the cells, and of table.md, table.tex, table.json and table.png."""
    format: Format = "terminal"
    """What is printed on standard output."""
    quiet: bool = False
    """Show no progress."""
    mini: bool = False
    """The table in miniature: a small policy and two invented worlds, made here in minutes. What
    it does not take are models, data, engine and lengths."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cells that are missing, and print the table."""
    config = tyro.cli(TableConfig, args=argv, prog="python -m benchmarks.paper_table")
    try:
        results = run_miniature(config, miniature.Miniature()) if config.mini else run(config)
    except (ResearchAgentError, ResearchEnvError) as error:
        print(f"benchmarks.paper_table: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    show(results, config.output, config.format)


def run(config: TableConfig) -> Results:
    """Fill the table with real models and data.

    Raises:
        ConfigError: names or numbers that cannot be used, before anything is played.
        ResearchAgentError, ResearchEnvError: a cell that cannot be played, or is of other settings.
    """
    if not config.models and not config.trained:
        raise ConfigError("there is nothing to play: give --models or --trained, or --mini")
    for given, known in ((config.datasets, DATASETS), (config.methods, LABELS)):
        for name in given:
            if name not in known:
                raise ConfigError(f"{name!r} is not known here; there is {', '.join(known)}")
    worlds = {DATASETS[name]: _arguments(config, name) for name in config.datasets}
    return fill(config, worlds, BASELINES)


def run_miniature(config: TableConfig, settings: miniature.Miniature) -> Results:
    """Fill the table of the miniature, whose policy and worlds are made first, or found."""
    with redirect_stdout(sys.stderr):  # standard output is the table's
        made = miniature.prepare(config.output, settings, config.seed, quiet=config.quiet)
    config = replace(
        config,
        models=(f"warm-start={made.policy}",),
        trained=(f"Trained search={made.trained}",),
        top_k=settings.top_k,
        sampling=SamplingConfig(
            temperature=config.sampling.temperature,
            max_in_flight=miniature.MAX_IN_FLIGHT,
            max_prompt=miniature.MAX_PROMPT,
            max_response=miniature.MAX_RESPONSE,
            max_turn_tokens=miniature.MAX_TURN_TOKENS,
        ),
        dtype="float32",
        workers=config.workers or miniature.WORKERS,
        limit=config.limit or miniature.DEV,
    )
    worlds = {name: {**args, "split": "dev"} for name, args in made.worlds.items()}
    return fill(config, worlds, MINIATURE)


def fill(
    config: TableConfig,
    datasets: Mapping[str, Mapping[str, Any]],
    baselines: Mapping[str, driver.Baseline],
) -> Results:
    """Play or find every cell.

    Args:
        config: models, methods and limits.
        datasets: the environment's arguments for each, by printed name.
        baselines: the methods, but for the search agent.

    Raises:
        ConfigError: cells failed that were played in processes of their own.
    """
    plan = [(spec, method) for spec in config.models for method in config.methods]
    plan += [(spec, "search_agent") for spec in config.trained]
    workers = config.workers or 1
    if workers > 1:
        alone = replace(config, trained=(), workers=1, quiet=True)
        jobs = {
            f"{spec}, {method}, {name}": (
                replace(alone, models=(spec,), methods=(method,)),
                {name: arguments},
                baselines,
            )
            for spec, method in plan
            for name, arguments in datasets.items()
        }
        if failed := run_all(fill_alone, jobs, workers):
            raise ConfigError(
                f"cells failed, as said above: {'; '.join(failed)}; the same command continues"
            )
    slots = config.sampling.max_in_flight or SLOTS
    sampler: Sampler | None = None
    rows = []
    for i, (spec, method) in enumerate(plan):
        trained = i >= len(plan) - len(config.trained)
        if sampler is None or sampler.spec != spec:
            if sampler is not None:
                sampler.close()  # one model in memory at a time
            sampler = Sampler(
                spec, config.sampling, slots=slots, dtype=config.dtype, device=config.device
            )
        label = sampler.label if trained else LABELS[method]
        several = len(config.models) > 1 and not trained
        cells = {
            name: play(
                config,
                sampler,
                method,
                name,
                arguments=arguments,
                baseline=baselines.get(method),
            )
            for name, arguments in datasets.items()
        }
        rows.append(
            Row(f"{label}, {sampler.label}" if several else label, sampler.name, trained, {
                name: replace(
                    cell,
                    published=published(config.paper, label, datasets[name]["dataset"]),
                )
                for name, cell in cells.items()
            })
        )  # fmt: skip
    if sampler is not None:
        sampler.close()
    return Results(rows, list(datasets))


def fill_alone(
    config: TableConfig,
    datasets: Mapping[str, Mapping[str, Any]],
    baselines: Mapping[str, driver.Baseline],
) -> str:
    """Fill a table of one cell, in a process of its own; says how it went."""
    (row,) = fill(config, datasets, baselines).rows
    (cell,) = row.cells.values()
    return f"exact match {cell.em:.2f}"


def play(
    config: TableConfig,
    sampler: Sampler,
    method: str,
    dataset: str,
    *,
    arguments: Mapping[str, Any],
    baseline: driver.Baseline | None,
) -> Cell:
    """Play what is missing of a cell; ``baseline`` is None for the search agent.

    Raises:
        PredictionsError: the folder holds a cell of another model or of other settings.
    """
    from research_agent.environments import make_environments  # noqa: PLC0415
    from research_agent.evaluation.evaluate import evaluate  # noqa: PLC0415
    from research_agent.evaluation.fingerprint import header  # noqa: PLC0415
    from research_agent.rollout import collect  # noqa: PLC0415

    folder = config.output / _plain(sampler.label) / method / _plain(dataset)
    given = {**arguments, "top_k": config.top_k, "protocol": "research"}
    given.setdefault("template", "instruct" if sampler.chat else "base")
    settings = EvalConfig(
        EnvironmentConfig(env=ENV, env_args=given),
        PolicyConfig(model=sampler.name, chat_template=sampler.chat, device=config.device),
        folder,
        config.sampling,
        endpoint=sampler.endpoint,
        limit=config.limit,
        seed=config.seed,
        dtype=config.dtype,
    )
    validate_eval(settings)
    slots = config.sampling.max_in_flight or SLOTS
    environments: Any
    if baseline is None:  # as a policy is played in training: nothing but the weights differs
        environments = make_environments(ENV, slots, given)
        player: Player = collect
    else:
        name = ENV.partition(":")[2]
        environments = gym.make_vec(
            name, num_envs=slots, vectorization_mode="vector_entry_point", **given
        )
        player = partial(driver.run, baseline=baseline)

    def on_demand(
        _: None, environments: Any, __: None, episodes: Sequence[Any], *args: Any, **kwargs: Any
    ) -> Sequence[Trajectory]:
        if not episodes:
            return []
        if not config.quiet:
            print(f"{sampler.label}, {method}, {dataset}: {len(episodes)}", file=sys.stderr)
        return player(sampler.engine, environments, sampler.renderer, episodes, *args, **kwargs)

    nobody: Any = None  # a model is loaded only where something is to be played
    limit = None if config.limit is None else min(config.limit, environments.num_tasks)
    try:
        summary = evaluate(
            nobody,
            environments,
            nobody,
            config.sampling,
            folder,
            limit=limit,
            seed=config.seed,
            header={**header(settings, environments, sampler.fingerprint), "method": method},
            show=not config.quiet,
            play=on_demand,
        )
    finally:
        environments.close()
    low, high = summary.intervals.get("em", (0.0, 0.0))
    return Cell(
        em=100 * summary.metrics.get("em", 0.0),
        interval=(100 * low, 100 * high),
        searches=summary.metrics.get("searches", 0.0),
        episodes=summary.episodes,
        void=summary.void,
        judged=read_judge(folder, summary.episodes),
        published=None,
        folder=str(folder),
    )


def show(results: Results, output: Path, form: Format = "terminal") -> None:
    """Write table.md, table.tex, table.json and table.png, and print one of the forms."""
    output.mkdir(parents=True, exist_ok=True)
    texts = {
        "md": rendering.markdown(results),
        "tex": rendering.latex(results),
        "json": rendering.as_json(results),
    }
    for ending, text in texts.items():
        write_atomic(output / f"table.{ending}", text)
    bars = rendering.chart(results, output / "table.png")
    if form == "terminal":
        Console().print(rendering.terminal(results))
        print(f"{output}/table.md, .tex, .json and .png ({bars})")
    else:
        print(texts[{"markdown": "md", "latex": "tex", "json": "json"}[form]], end="")
    void = sum(cell.void for row in results.rows for cell in row.cells.values())
    if void:
        message = f"{void} episodes are void, and in no mean; the same command plays them again"
        print(message, file=sys.stderr)


def _arguments(config: TableConfig, dataset: str) -> dict[str, Any]:
    split = config.split or ("dev-all" if config.retriever else "dev")
    if dataset == "bamboogle":
        split = "test"
    retriever = config.retriever and config.retriever.replace("{dataset}", dataset)
    return {"dataset": dataset, "split": split, "retriever": retriever}


def _plain(name: str) -> str:
    """A name as one part of a path."""
    return "".join(char if char.isalnum() or char in "-._" else "-" for char in name)


if __name__ == "__main__":
    main()
