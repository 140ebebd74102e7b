"""What the command line does, in Python: train, evaluate before and after, compare, report.

python docs/examples/train_and_evaluate.py --steps 40
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from research_agent import (
    PRESETS,
    EvalConfig,
    PolicyConfig,
    ReportConfig,
    compare,
    evaluate_model,
    make_report,
    train,
)


def main() -> None:
    """Train the demo's policy and show what changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--questions", type=int, default=100, help="held-out questions")
    parser.add_argument("--output", type=Path, default=Path("runs/example"))
    options = parser.parse_args()
    preset, folder = PRESETS["miniworld"], options.output

    run = replace(preset.run, steps=options.steps, eval_every=0, output=folder / "train")
    print(train(replace(preset, run=run)).message)

    for name, model in {"before": preset.policy.model, "after": str(folder / "train")}.items():
        summary = evaluate_model(
            EvalConfig(
                environment=preset.environment,
                split="dev",
                policy=PolicyConfig(model=model),
                limit=options.questions,
                output=folder / name,
            )
        )
        means = summary.metrics
        print(f"{name}: exact match {means['em']:.3f}, searches {means['searches']:.2f}")

    comparison = compare(folder / "before", folder / "after")
    print(f"{comparison.questions} questions compared")
    report = make_report(
        ReportConfig(paths=(folder / "train", folder / "before", folder / "after"))
    )
    print(f"open {report.page}")


if __name__ == "__main__":
    main()
