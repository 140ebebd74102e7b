"""What becomes of hostile input: files by strangers and disks that forget, tried for real.

``python -m benchmarks.hostile [--json] [--only WORDS]``

Each section makes inputs and tries them in a process of its own, so that a signal, a hang and the
peak of memory are seen. An input is right when it is refused by an error of ours, or read as data
without harm. A raw exception, a signal and a hang are wrong.

To add a section, write a function that yields :class:`~benchmarks.hostile_trials.Case` values, and
name it in ``SECTIONS``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from benchmarks.hostile_files import index_cases, question_file_cases, recording_cases
from benchmarks.hostile_requests import serve_cases
from benchmarks.hostile_trials import Row, run_section


def hostile_files() -> list[Row]:
    """Indexes, recordings, question files and corpora."""
    return [
        run_section("indexes", index_cases),
        run_section("recordings", recording_cases),
        run_section("questions and passages", question_file_cases),
    ]


def hostile_requests() -> list[Row]:
    """Requests to ``research-env serve``."""
    return [run_section("serve", serve_cases)]


def hostile_models() -> list[Row]:
    """Weight files of models and adapters."""
    from benchmarks.hostile_models import model_cases  # noqa: PLC0415 - loads torch

    return [run_section("models", model_cases)]


SECTIONS: dict[str, Callable[[], list[Row]]] = {
    "files": hostile_files,
    "serve": hostile_requests,
    "models": hostile_models,
}


def report(only: str = "", as_json: bool = False) -> bool:
    """Run the sections and print a table.

    Args:
        only: run the sections whose name holds this.
        as_json: print one line of JSON per row instead.

    Returns:
        Whether every input was right.
    """
    line = "| {:<24} | {:>5} | {:>7} | {:>12} | {:>8} | {:>6} | {:>14} |"
    if not as_json:
        titles = ("hostile input", "tried", "refused", "typed errors", "harmless", "killed")
        print(line.format(*titles, "peak memory"), line.format(*["---"] * 7), sep="\n")
    safe = True
    for name, section in SECTIONS.items():
        for row in section() if only in name else []:
            safe &= not row.wrong
            values = asdict(row)
            if as_json:
                print(json.dumps(values), flush=True)
                continue
            wrong = values.pop("wrong")
            values["peak_mb"] = f"{row.peak_mb:,.0f} MB more"
            print(line.format(*values.values()), flush=True)
            for each in wrong:
                print(f"wrong: {each}")
    return safe


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; exits with 1 where an input is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each row")
    parser.add_argument("--only", default="", help="only sections whose name holds this")
    chosen = parser.parse_args(arguments)
    raise SystemExit(0 if report(chosen.only, chosen.json) else 1)


if __name__ == "__main__":
    main()
