"""What becomes of a run on two ranks and two servers when something fails, by causing it.

``python -m benchmarks.faults --distributed [--json] [--only WORDS]``

Each run trains MiniWorld's policy for four steps: torchrun starts two ranks (gloo), two real vLLM
servers sample, and a retrieval server searches. The faults are real: processes are killed with
SIGKILL, the retrieval server closes its port, and the disk is full.

A run is right when each step learns from the episodes that the configuration says, none of them
void and none twice, and when its fault has happened.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from tests.research_agent.disks import resize, small_disk

ROOT = Path(__file__).parents[1]
STARTER = ROOT / "research_agent" / "starters" / "miniworld-starter"
STEPS, PROMPTS, SAMPLES = 4, 4, 4
AWAY = 60.0
"""Seconds that the retrieval server is away."""
DISK = 18_000
"""Kilobytes of the small disk: room for the checkpoint of step 2, but not for that of step 4."""
PROGRAM: tuple[str, ...] = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
"""What runs a server."""

FAULTS = {
    "none": "none",
    "turn": "a server killed while it samples",
    "weights": "a server killed while it loads weights",
    "rank": "a rank killed in an update",
    "away": f"the search engine away for {AWAY:g} s",
    "disk": "the disk full at a checkpoint",
}


@dataclass(frozen=True)
class Row:
    """What became of a run.

    Attributes:
        fault: what went wrong.
        happened: whether it did happen.
        starts: how many times the ranks were started.
        steps: steps that the run made.
        episodes: episodes that it learned from.
        void: episodes that it could not learn from.
        same: whether they are those that the configuration says, step by step.
        back: turns that a server sampled after it was killed and started again.
        seconds: duration of the whole run.
    """

    fault: str
    happened: bool
    starts: int
    steps: int
    episodes: int
    void: int
    same: bool
    back: int
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether nothing was lost."""
        return self.happened and self.same and not self.void and self.steps == STEPS


Learned = dict[int, list[tuple[int, int]]]
"""Episode and sample of all that a step learned from, by step."""
EXPECTED: Learned = {
    step: [
        (episode, sample)
        for episode in range((step - 1) * PROMPTS, step * PROMPTS)
        for sample in range(SAMPLES)
    ]
    for step in range(1, STEPS + 1)
}
"""What the configuration says that the steps learn from."""


def matrix(only: str = "", *, as_json: bool = False) -> bool:
    """Cause all faults and print what became of each run; returns whether all are right."""
    titles = ("fault", "starts", "steps", "episodes", "void", "same", "turns after return", "s")
    line = "| {:<40} | {:>6} | {:>5} | {:>8} | {:>4} | {:>4} | {:>18} | {:>4} |"
    if not as_json:
        print(line.format(*titles), line.format(*["---"] * len(titles)), sep="\n", flush=True)
    right = True
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        servers = [Server(folder / f"server-{i}") for i in range(2)]
        for server in servers:
            stack.callback(server.close)
        for server in servers:
            server.wait()
        for fault in [fault for fault, name in FAULTS.items() if only in name]:
            row = measure(fault, folder / fault, servers)
            right &= row.is_right
            if as_json:
                print(json.dumps(asdict(row)), flush=True)
                continue
            name = row.fault if row.happened else f"{row.fault} (DID NOT HAPPEN)"
            shown = [row.starts, row.steps, row.episodes, row.void, "yes" if row.same else "NO"]
            print(line.format(name, *shown, row.back, f"{row.seconds:.0f}"), flush=True)
    return right


def measure(fault: str, folder: Path, servers: Sequence[Server]) -> Row:
    """Make a run with a fault.

    Args:
        fault: a key of ``FAULTS``.
        folder: a new one, for the run and all that is written on the way.
        servers: the servers that sample; all of them run.

    Returns:
        What became of it; why a run failed is printed.
    """
    start = time.monotonic()
    folder.mkdir()
    with ExitStack() as stack:
        search = stack.enter_context(_search_engine(fault, folder))
        run = folder / "run"
        if fault == "disk":
            run = stack.enter_context(small_disk(folder / "disk", DISK)) / "run"
        words = [fault, str(folder), *_words(run, search, [server.url for server in servers])]
        status = _train(folder, words)
        if fault == "disk" and status and f"the checkpoint of step {STEPS}" in _log(folder):
            (folder / "happened").touch()
            resize(folder / "disk", 10 * DISK)
            status = _train(folder, words)
        for server in servers:
            server.wait()
        if status:
            said = [line for line in _log(folder).splitlines() if "research-agent: error" in line]
            print("the run failed:", *(said or [_log(folder)[-4000:]]), file=sys.stderr)
        learned, void = _learned(run)
    return Row(
        FAULTS[fault],
        happened=(folder / "happened").exists() or fault == "none",
        starts=_lines(folder / "starts"),
        steps=len(learned),
        episodes=sum(map(len, learned.values())),
        void=void,
        same=learned == EXPECTED,
        back=_lines(folder / "turns"),
        seconds=time.monotonic() - start,
    )


def _words(run: Path, search: str, urls: Sequence[str]) -> list[str]:
    """The command of the run."""
    flags = {
        "--output": run,
        "--engine": f"server:{','.join(urls)}",
        "--steps": STEPS,
        "--prompts-per-step": PROMPTS,
        "--group-size": SAMPLES,
        "--learning-rate": 1e-5,
        "--save-every": 2,
        "--eval-every": 0,
        "--log-episodes": 10**6,
        "--device": "cpu",
        "--env-args": f"retriever={search}?deadline={4 * AWAY:g}",
    }
    return ["train", "miniworld", "--quiet", *(str(w) for pair in flags.items() for w in pair)]


def _train(folder: Path, words: Sequence[str]) -> int:
    """Run the command on two ranks; returns the exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1" if words[0] == "rank" else "--max-restarts=0"]
    with (folder / "log").open("ab") as log:
        done = subprocess.run(
            [*command, "-m", "benchmarks.failing_rank", *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
            stdout=log,
            stderr=log,
            timeout=1200,
            check=False,
        )
    return done.returncode


def _log(folder: Path) -> str:
    return (folder / "log").read_text(encoding="utf-8", errors="replace")


def _lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def _learned(run: Path) -> tuple[Learned, int]:
    """What each step of a run learned from, and the number of void episodes."""
    learned: Learned = {}
    void = 0
    file = run / "trajectories.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        record = json.loads(line)
        if record.get("void"):
            void += 1
            continue
        learned.setdefault(record["step"], []).append((record["episode"], record["sample"]))
    return {step: sorted(episodes) for step, episodes in learned.items()}, void


# --- the servers and the search engine -----------------------------------------------------------


class Server:
    """A vLLM server that is started again when it is killed.

    Args:
        file: where the number of its process group is written once it answers.

    Attributes:
        url: its address, the same after a restart.
    """

    def __init__(self, file: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._file = file
        self._over = threading.Event()
        self._process = self._start()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def wait(self) -> None:
        """Wait until the server that runs now answers.

        Raises:
            RuntimeError: it does not for a quarter of an hour.
        """
        deadline = time.monotonic() + 900
        while not self._file.exists() or self._file.read_text() != str(self._process.pid):
            if time.monotonic() > deadline:
                log = self._file.with_suffix(".log").read_text(errors="replace")
                raise RuntimeError(f"a server does not start: {log[-4000:]}")
            time.sleep(0.2)

    def close(self) -> None:
        """Stop it."""
        self._over.set()
        self._watcher.join()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        words = f"--host=127.0.0.1 --port={self._port} --max-model-len=480 --max-num-seqs=16"
        words += " --dtype=float32 --enforce-eager --no-enable-chunked-prefill"
        words += " --max-num-batched-tokens=4096 --enable-scale-out --load-format=dummy"
        words += " --logprobs-mode=processed_logprobs"
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        with self._file.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                [*PROGRAM, f"--model={STARTER}", *words.split()],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,  # its processes are killed together
            )

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            if self._process.poll() is not None:
                self._process = self._start()
            with suppress(httpx.HTTPError):
                answer = httpx.get(f"{self.url}/health", timeout=5, trust_env=False)
                if answer.status_code == 200 and self._process.poll() is None:
                    self._file.write_text(str(self._process.pid))


@contextmanager
def _search_engine(fault: str, folder: Path) -> Iterator[str]:
    """A retrieval server with MiniWorld's passages, which may go away during a search."""
    from research_env.datasets import load_dataset  # noqa: PLC0415
    from research_env.retrieval import Hit, open_retriever  # noqa: PLC0415
    from research_env.retrieval.serve import RetrievalServer  # noqa: PLC0415

    embedded = open_retriever(None, load_dataset("miniworld", split="train").corpus)
    leaving, gone, over = threading.Event(), threading.Event(), threading.Event()

    class Leaving:
        """Does not answer the first search after step 1."""

        def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | Any]:
            """Answer every query of a batch."""
            if fault == "away" and (folder / "step-1").exists() and not gone.is_set():
                leaving.set()
                gone.wait()
            return embedded.search(queries, top_k)

        def close(self) -> None:
            """Release nothing."""

    servers = [RetrievalServer(Leaving())]
    port = int(servers[0].url.rpartition(":")[2].partition("/")[0])

    def leave() -> None:
        while not leaving.wait(0.05):
            if over.is_set():
                return
        servers[0].stop(patience=1)
        (folder / "happened").touch()
        over.wait(AWAY)
        gone.set()
        servers.append(RetrievalServer(Leaving(), port=port))

    thread = threading.Thread(target=leave)
    thread.start()
    try:
        yield servers[0].url
    finally:
        over.set()
        thread.join()
        servers[-1].stop()
        embedded.close()
