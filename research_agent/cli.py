"""The command line: research-agent train | eval | compare | grade | sample | sft | report."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import tyro

from research_agent import plan
from research_agent.algorithms import ALGORITHMS, make_algorithm
from research_agent.config import (
    CompareConfig,
    EvalConfig,
    GradeConfig,
    ReportConfig,
    SampleConfig,
    TrainConfig,
    complete,
)
from research_agent.config_checks import require_seed, validate, validate_eval
from research_agent.errors import (
    ConfigError,
    ContextError,
    ModelError,
    ResearchAgentError,
    StoppedError,
)
from research_agent.formats import finite
from research_agent.presets import DESCRIPTIONS, PRESETS
from research_agent.system.terminal import escape_unencodable, escaped_logs, show
from research_agent.system.torchrun import is_first_rank, torchrun

USAGE = """\
usage: research-agent COMMAND ...

Trains a language model in any Gymnasium environment that speaks text.

  train PRESET [...]   train by reinforcement learning; started again, it continues
  eval [...]           play tasks with a model and average what the environment reports
  compare A B [...]    two evaluations of the same questions: differences, and their chance
  grade EVAL [...]     call questions easy, medium or hard by how many samples are right
  sample EVAL [...]    keep the right samples as demonstrations
  sft PRESET [...]     fit a model to demonstrations: the warm start of a small policy
  report PATH...       a page of curves, means and trajectories, two runs side by side

research-agent COMMAND --help explains every setting. Try: research-agent train miniworld
"""
C = TypeVar("C")


@escaped_logs()
def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; an error is one message on standard error, and exit status 2.

    Args:
        argv: the words after the program's name; those of the process when None.
    """
    escape_unencodable()
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "train": _train,
        "eval": _eval,
        "compare": _compare,
        "grade": _grade,
        "sample": _sample,
        "sft": _sft,
        "report": _report,
    }
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        raise SystemExit(0 if words else 2)
    try:
        if words[0] not in commands:
            raise ConfigError(f"unknown command {words[0]!r}; known: {', '.join(commands)}")
        commands[words[0]](words[1:])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever read our output has enough
        sys.stdout = None
        raise SystemExit(1) from None
    except (ResearchAgentError, OSError) as error:
        _fail(str(error), shown=isinstance(error, StoppedError))
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "safetensors", "matplotlib", "aiohttp"):
            raise
        _fail(f"{error.name} is not installed; pip install 'research-env[agent]'")
    except Exception as error:
        # An environment's error classes say what is wrong, as ours do. A built-in error means a
        # mistake in the code, and keeps its traceback.
        if type(error).__module__ == "builtins":
            raise
        _fail(f"{type(error).__name__}: {error}")


_WITHOUT_GROUPS = ("ppo", "mt_ppo", "reinforce_pp")  # the last with its default baseline


def _notes(config: TrainConfig) -> Iterator[str]:
    """What a user may not have meant."""
    trained_on, evaluated = config.environment.env_args, config.run.eval_args
    if config.run.eval_every and {**trained_on, **evaluated} == trained_on:
        yield (
            "evaluations play the tasks of training, since --eval-args names no others; give "
            "--eval-args split=dev, or what else the environment takes"
        )
    name = config.algorithm.algorithm
    compares = name not in _WITHOUT_GROUPS
    compares |= config.algorithm.algorithm_args.get("baseline") == "group"
    if config.rollout.group_size == 1 and name in ALGORITHMS and compares:
        yield (
            f"{name} compares the episodes of a group, and --group-size 1 leaves nothing to "
            f"compare; give 2 or more, or --algorithm {_WITHOUT_GROUPS[0]}"
        )


def _train(words: list[str]) -> None:
    name = _choose("train", words, DESCRIPTIONS)
    preset = PRESETS[name]
    description = f"{DESCRIPTIONS[name]} {_algorithm_settings(preset)}"
    config = _parse(TrainConfig, f"train {name}", words[1:], description, preset)
    config = complete(config, preset)
    validate(config)
    if config.run.plan:
        with _naming_the_preset(name, preset, config):
            _plan(config, config.run.plan)
        return
    for note in _notes(config) if is_first_rank() and not config.run.quiet else ():
        show(f"research-agent: note: {note}", file=sys.stderr)
    from research_agent.trainer import train  # noqa: PLC0415  (loads torch: not for --help)

    _no_bars()
    with _naming_the_preset(name, preset, config):
        summary = train(config)
    if is_first_rank():  # one of torchrun's processes prints
        _print(summary.message, summary.numbers, as_json=config.run.json)
    if summary.signal:
        raise SystemExit(128 + summary.signal)


@contextmanager
def _naming_the_preset(name: str, preset: TrainConfig, config: TrainConfig) -> Iterator[None]:
    """Say in an error that the setting at fault is the preset's own."""
    try:
        yield
    except ContextError as error:
        limit = config.sampling.max_prompt
        if limit != preset.sampling.max_prompt:
            raise
        raise ContextError(f"{error} (--max-prompt {limit} is the preset {name}'s)") from error
    except ModelError as error:
        from research_agent.sft import PRESETS as starts  # noqa: N811, PLC0415

        if config.policy.model != preset.policy.model or name not in starts:
            raise
        own = f"(the preset {name}'s; research-agent sft {name} makes it)"
        raise ModelError(f"{error} {own}") from error


def _plan(config: TrainConfig, gpus: str) -> None:
    found = plan.plan(config, gpus)
    as_json = config.run.json
    show(json.dumps(plan.as_numbers(found)) if as_json else plan.show(config, found))
    if not found.fits:
        raise SystemExit(2)


def _eval(words: list[str]) -> None:
    config = _parse(EvalConfig, "eval", words)
    validate_eval(config)
    from research_agent.evaluation.evaluate_model import evaluate_model  # noqa: PLC0415 (torch)
    from research_agent.evaluation.summary import print_tables, tables  # noqa: PLC0415

    _no_bars()
    with _continued_by_the_same_command():
        summary = evaluate_model(config)
    if config.json:
        show(json.dumps(finite(dataclasses.asdict(summary))))
        return
    predictions = config.output / "predictions.jsonl"
    show(f"{config.policy.model} in {config.environment.env}, every episode in {predictions}")
    print_tables(*tables(summary))
    if summary.void:
        show(f"{summary.void} episodes are void; the same command plays them again")


def _compare(words: list[str]) -> None:
    config = _parse(CompareConfig, "compare", words)
    from research_agent.evaluation.compare import compare, in_words, table  # noqa: PLC0415
    from research_agent.evaluation.summary import print_tables  # noqa: PLC0415

    require_seed(config.seed)
    comparison = compare(config.a, config.b, metric=config.metric, seed=config.seed)
    if config.json:
        show(json.dumps(finite(dataclasses.asdict(comparison))))
        return
    show(f"A is {config.a}, B is {config.b}")
    print_tables(table(comparison))
    show(in_words(comparison))


def _grade(words: list[str]) -> None:
    config = _parse(GradeConfig, "grade", words)
    from research_agent.evaluation.difficulty import write_grades  # noqa: PLC0415

    shares = {"metric": config.metric, "easy": config.easy, "hard": config.hard}
    counts = write_grades(config.predictions, config.output, **shares)
    message = f"{counts.total()} questions of {config.predictions} in {config.output}"
    numbers = {grade: counts[grade] for grade in ("easy", "medium", "hard")}
    _print(message, numbers, as_json=config.json)


def _sample(words: list[str]) -> None:
    config = _parse(SampleConfig, "sample", words)
    from research_agent.evaluation.difficulty import write_demonstrations  # noqa: PLC0415

    kept, count = write_demonstrations(
        config.predictions, config.output, metric=config.metric, each=config.each
    )
    message = f"{kept} of {count} episodes of {config.predictions} in {config.output}"
    _print(message, {"kept": kept, "episodes": count}, as_json=config.json)


def _sft(words: list[str]) -> None:
    from research_agent import sft  # noqa: PLC0415  (reads the presets of installed packages)

    name = _choose("sft", words, sft.DESCRIPTIONS)
    preset = sft.PRESETS[name]
    config = _parse(sft.SFTConfig, f"sft {name}", words[1:], sft.DESCRIPTIONS[name], preset)
    _no_bars()
    with _continued_by_the_same_command():
        sft.run(config)


@contextmanager
def _continued_by_the_same_command() -> Iterator[None]:
    """Say at Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        show("\nstopped; the same command continues where this one stopped", file=sys.stderr)
        raise


def _report(words: list[str]) -> None:
    config = _parse(ReportConfig, "report", words)
    from research_agent.report import make_report  # noqa: PLC0415  (loads matplotlib)

    report = make_report(config)
    for note in report.notes:
        show(f"research-agent: note: {note}", file=sys.stderr)
    if report.curve:
        show(f"{report.curve}\n")
    show(f"page     {report.page} ({report.page.stat().st_size / 1e6:.1f} MB)")
    if report.picture:
        show(f"picture  {report.picture}")


def _choose(command: str, words: Sequence[str], descriptions: Mapping[str, str]) -> str:
    """The preset that the first word names; help and errors list all of them."""
    width = max(map(len, descriptions)) + 2
    known = "\n".join(f"  {name:{width}}{text}" for name, text in descriptions.items())
    if words and words[0] in descriptions:
        return words[0]
    if words and words[0] in ("-h", "--help"):
        show(f"usage: research-agent {command} PRESET [...]\n\n{known}\n")
        show(f"research-agent {command} PRESET --help explains the settings of one.")
        raise SystemExit(0)
    given = f"unknown preset {words[0]!r}" if words else "no preset given"
    raise ConfigError(f"{given}; research-agent {command} takes one of\n{known}")


def _parse(
    kind: type[C], command: str, words: Sequence[str], description: str = "", default: Any = None
) -> C:
    options: dict[str, Any] = {} if default is None else {"default": default}
    parsed: C = tyro.cli(
        kind,
        args=words,
        prog=f"research-agent {command}",
        description=description or None,
        config=(tyro.conf.OmitArgPrefixes,),
        **options,
    )
    return parsed


def _algorithm_settings(preset: TrainConfig) -> str:
    name = preset.algorithm.algorithm
    if name not in ALGORITHMS:
        return ""
    chosen: Any = make_algorithm(name)
    settings = " ".join(f"{f.name}={getattr(chosen, f.name)}" for f in dataclasses.fields(chosen))
    return f"Settings of {name} for --algorithm-args, with its defaults: {settings}."


def _print(message: str, numbers: Mapping[str, float | str], *, as_json: bool) -> None:
    if as_json:
        show(json.dumps(numbers))
        return
    show(message)
    shown = {k: f"{v:.3f}" if isinstance(v, float) else str(v) for k, v in numbers.items()}
    for name in [name for name in shown if name.endswith(" first")]:
        change = name.removesuffix(" first")
        shown[change] = f"{shown.pop(name)} -> {shown.pop(f'{change} last')}"
    width = max(map(len, shown), default=0)
    for name, text in shown.items():
        show(f"  {name:{width}}  {text}")


def _no_bars() -> None:
    """Transformers' progress bars would break ours, at every checkpoint."""
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()


def _fail(message: str, *, shown: bool = False) -> NoReturn:
    """End the program with exit status 2; of several ranks only the first shows the message.

    Args:
        message: what is wrong.
        shown: whether the first rank shows it already.
    """
    if not is_first_rank() and not shown:
        import torch.distributed  # noqa: PLC0415 - slow to import

        # Before the ranks have met, an error is the same on all of them.
        shown = not torch.distributed.is_initialized()
    if not shown:
        show(f"research-agent: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def program(argv: Sequence[str] | None = None) -> None:
    """Run ``main`` as a process of its own; one that torchrun started ends at once when it is done.

    Python would first dismantle itself while gloo's threads still let go of their tensors, which
    aborts a process now and then (https://github.com/pytorch/pytorch/issues/190489).

    Args:
        argv: as for ``main``.
    """
    if torchrun("WORLD_SIZE", 1) == 1:
        main(argv)
        return
    status = 0
    try:
        main(argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    program()
