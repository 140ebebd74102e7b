"""Elasticsearch from scratch: index a corpus, search it, and play an episode that searches it.

    docker compose up -d
    python docs/examples/elasticsearch_from_scratch.py localhost:9200

It writes two files into the current folder and the index "from-scratch" into the cluster. Running
it again changes nothing in the index.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gymnasium as gym

import research_env  # noqa: F401  (registers the ids)
from research_env.datasets import FileCorpus
from research_env.retrieval import open_retriever
from research_env.retrieval.elasticsearch.indexing import Layout, index_elasticsearch

PASSAGES = [
    {"id": "p1", "title": "Ada", "text": "Ada founded the company Nordwind."},
    {"id": "p2", "title": "Nordwind", "text": "Nordwind is a company in Oslo."},
    {"id": "p3", "title": "Fjordline", "text": "Ben Lie founded Fjordline, a company in Bergen."},
]
QUESTIONS = [
    {
        "id": "q1",
        "question": "In which city is the company that Ada founded?",
        "answers": ["Oslo"],
        "supporting": ["p1", "p2"],
    },
]


def write_lines(path: Path, records: list[dict[str, object]]) -> None:
    """Write a JSON Lines file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main(address: str) -> None:
    """Index, search and play with the server at an address such as localhost:9200."""
    url = f"elasticsearch://{address}/from-scratch"
    write_lines(Path("passages.jsonl"), PASSAGES)
    write_lines(Path("questions.jsonl"), QUESTIONS)

    done = index_elasticsearch(
        FileCorpus("passages", Path("passages.jsonl")), url, Layout(shards=1)
    )
    print(f"{done.passages} passages in {done.index}, {done.sent} of them new")

    retriever = open_retriever(url, None)
    (hits,) = retriever.search(["company founded by Ada"], top_k=2)
    retriever.close()
    for hit in hits:
        print(f"{hit.score:6.3f}  {hit.passage.title}: {hit.passage.text}")

    env = gym.make(
        "SearchQA-v0",
        questions="questions.jsonl",
        corpus="passages.jsonl",
        retriever=url,
        top_k=2,
        template="question",
    )
    env.reset(seed=0)
    for query in ("company founded by Ada", "Nordwind"):
        observation, *_ = env.step(f"<search>{query}</search>")
        print(observation)
    *_, reward, _, _, info = env.step("<answer> \\boxed{Oslo} </answer>")
    print(f"reward {reward}, gold passages found: {info['metrics']['support_recall']:.0%}")
    env.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "localhost:9200")
