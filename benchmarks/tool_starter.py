"""Make the starter of ``recall-7b-mini``: a policy that can call tools in MiniWorld.

``python -m benchmarks.tool_starter [--count N] [--output FOLDER]``

It is made of the starter of MiniWorld, which searches with ReSearch's tags, in two steps. First the
tokens of the tags get the texts of ReCall's tool calls; the weights do not change, so the policy
can read and plan from the beginning. Then supervised fine-tuning shows it whole episodes with calls
(:func:`research_env.demonstrations.tool_demonstrations`). The last of them have bad habits, such as
to guess at once, to stop half-way, or to forget the box, so that calls are rare.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from research_agent.models.source import STARTERS
from research_agent.sft import SFTConfig, run
from research_env.demonstrations import tool_vocabulary


def rename_phrases(source: Path, target: Path, phrases: Mapping[str, str]) -> None:
    """Copy a model whose tokenizer knows whole phrases, with other texts for some tokens.

    Args:
        source: folder of the model.
        target: folder of the copy.
        phrases: the new text of a token by its old one.
    """
    shutil.copytree(source, target, dirs_exist_ok=True)
    file = target / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    known = {phrase for phrase, _ in vocabulary}
    missing = sorted(phrases.keys() - known)
    if missing:
        raise ValueError(f"{source} knows no token {missing}")
    tokenizer["model"]["vocab"] = [[phrases.get(text, text), score] for text, score in vocabulary]
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def make_starter(output: Path, count: int = 3_600) -> Path:
    """Rename the tokens of the starter, and fine-tune it.

    Args:
        output: folder of the model.
        count: demonstrations.
    """
    with tempfile.TemporaryDirectory() as folder:
        renamed = Path(folder) / "renamed"
        rename_phrases(STARTERS / "miniworld-starter", renamed, tool_vocabulary())
        return run(
            SFTConfig(
                demonstrations="research_env.demonstrations:tool_demonstrations",
                demonstration_args={"top_k": 1},
                model=str(renamed),
                count=count,
                batch_by_length=True,
                learning_rate=5e-4,
                decay_share=1.0,
                final_share=0.4,  # what is left for the habits, which come last
                threads=1,
                output=output,
            )
        )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=3_600, help="demonstrations")
    parser.add_argument("--output", type=Path, default=Path("runs/miniworld-tools-starter"))
    arguments = parser.parse_args()
    make_starter(arguments.output, arguments.count)


if __name__ == "__main__":
    main()
