"""What it takes to index a large corpus into Elasticsearch: rate, and memory of our process.

``python -m benchmarks.elasticsearch_index [--passages 1000000] [--json]``

Passages of 100 words, drawn by Zipf's law from 50,000, are written to a file, and the file is
indexed as ``research-env index --corpus FILE --to elasticsearch://...`` does, into the server that
ELASTICSEARCH_URL names or one that is started for it. Memory is the largest resident set of a new
process that does nothing else; the server's is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.elasticsearch.server import start

WORDS = 100
_INDEX = """
import json, resource, sys, time
from pathlib import Path
from research_env.datasets import FileCorpus
from research_env.retrieval.elasticsearch.indexing import index_elasticsearch

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
corpus = FileCorpus("generated", Path(sys.argv[1]))
corpus.fingerprint()
read = time.perf_counter()
done = index_elasticsearch(corpus, sys.argv[2])
end = time.perf_counter()
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "passages": done.passages,
    "sent": done.sent,
    "fingerprint_seconds": round(read - start, 1),
    "index_seconds": round(end - read, 1),
    "passages_per_second": round(done.sent / (end - read)),
    "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    "start_megabytes": round(before / 1e3),
    "peak_megabytes": round(usage.ru_maxrss / 1e3),
}))
"""


def generate(path: Path, passages: int) -> None:
    """Write a corpus of made-up passages; the same number gives the same file."""
    draw = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, passages, 1000):
            ranks = np.minimum(draw.zipf(1.2, (min(1000, passages - first), WORDS)), 50_000)
            for row, words in enumerate(ranks.tolist(), start=first):
                text = " ".join(f"word{word}" for word in words)
                file.write(f'{{"id": "p{row}", "title": "Title {row}", "text": "{text}"}}\n')


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate, index twice (the second time nothing is to do), and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    named = os.environ.get("ELASTICSEARCH_URL")
    server = None if named else start()
    try:
        url = (named or (server.url if server else "")).replace("http", "elasticsearch", 1)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "corpus.jsonl"
            generate(file, chosen.passages)
            for what in ("first", "again"):
                command = [sys.executable, "-c", _INDEX, str(file), f"{url}/benchmark-generated"]
                took = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                values = {"run": what, "file_megabytes": file.stat().st_size // 10**6}
                values |= json.loads(took)
                if chosen.json:
                    print(json.dumps(values), flush=True)
                else:
                    print(", ".join(f"{key} {value}" for key, value in values.items()), flush=True)
    finally:
        if server is not None:
            server.stop()


if __name__ == "__main__":
    main()
