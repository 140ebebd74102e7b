"""The data sets of ``--tiny``: invented worlds, written as the published sets are."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

from benchmarks.real.stages import HELD_OUT, TRAINED_ON
from research_env.datasets import miniworld
from research_env.datasets.catalog import PUBLISHED


def write_tiny_data(folder: Path, seed: int) -> None:
    """Write questions and passages of a small world in the place of each published data set.

    Args:
        folder: what ``RESEARCH_DATA`` has to name afterwards.
        seed: seed of the questions.
    """
    for number, name in enumerate((*TRAINED_ON, HELD_OUT)):
        place = folder / PUBLISHED[name].folder
        place.mkdir(parents=True, exist_ok=True)
        world = miniworld.world(number)
        rng = random.Random(f"tiny {name} {seed}")
        questions = [
            {
                "id": f"{name}-{number}-{i}",
                "question": question.question,
                "answers": list(question.answers),
                "supporting": list(question.supporting),
                "hops": question.hops,
                "type": question.type,
                "split": "train" if i < 60 else "dev",
            }
            for i, question in enumerate(miniworld.questions(world, rng, 80))
        ]
        passages = [{"id": p.id, "title": p.title, "text": p.text} for p in world.passages]
        for kind, records in (("questions", questions), ("corpus", passages)):
            text = "".join(f"{json.dumps(record)}\n" for record in records)
            (place / f"{kind}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
