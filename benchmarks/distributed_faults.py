"""What becomes of a run on two ranks and two servers when something fails, by causing it.

``python -m benchmarks.faults --distributed [--json] [--only WORDS]``

Each run trains MiniWorld's policy for four steps: torchrun starts two ranks (gloo), two vLLM
servers sample, and a retrieval server searches. The servers are the tests' servers without vLLM, in
processes of their own: they take weights from a folder and control calls as vLLM does, and sample a
search and then an answer by a script. The faults are real: processes are killed with SIGKILL, the
retrieval server closes its port, and a write to the disk fails.

A run is right when each step learns from the episodes that the configuration says, none of them
void and none twice, and when its fault has happened.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
STARTER = ROOT / "research_agent" / "starters" / "miniworld-starter"
SIZES = (4, 1041, 128)  # layers, tokens and width of the shipped policy
END_ID = 1  # the token that ends a turn of the shipped policy
STEPS, PROMPTS, SAMPLES = 4, 4, 4
SEARCH = "<think>Look.</think><search>where is {}</search>"  # another one for each seed
ANSWERS = (r"<answer>It is \boxed{it}</answer>", "<answer>It is here</answer>")
AWAY = 5.0
"""Seconds that the retrieval server is away."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong once in a run.

    Attributes:
        name: what it is.
        server: what kills the first server: "turn" or "weights" (the second that it is given).
        rank: what the last rank does in the update of step 3: "dies".
        disk: whether the second rank's disk is full when the checkpoint of step 2 is written; the
            same command is started again afterwards.
        away: whether the retrieval server goes away for ``AWAY`` seconds.
    """

    name: str
    server: str = ""
    rank: str = ""
    disk: bool = False
    away: bool = False


FAULTS = (
    Fault("none"),
    Fault("a server killed while it samples", server="turn"),
    Fault("a server killed while it loads weights", server="weights"),
    Fault("a rank killed in an update", rank="dies"),
    Fault(f"the search engine away for {AWAY:g} s", away=True),
    Fault("the disk full at a checkpoint", disk=True),
)


@dataclass(frozen=True)
class Row:
    """What became of a run.

    Attributes:
        fault: its name.
        happened: whether the fault did happen.
        starts: how many times the ranks were started.
        steps: steps that the run made.
        episodes: episodes that it learned from.
        void: episodes that it could not learn from.
        same: whether they are those that the configuration says, step by step.
        back: turns that a server sampled after it was killed and started again.
        seconds: of the whole run.
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
    line = "| {:<40} | {:>6} | {:>5} | {:>8} | {:>4} | {:>4} | {:>18} | {:>7} |"
    titles = (
        "fault",
        "starts",
        "steps",
        "episodes",
        "void",
        "same",
        "turns after return",
        "seconds",
    )
    if not as_json:
        print(line.format(*titles), line.format(*["---"] * len(titles)), sep="\n", flush=True)
    right = True
    for fault in FAULTS:
        if only not in fault.name:
            continue
        with TemporaryDirectory() as folder:
            row = measure(fault, Path(folder))
        right &= row.is_right
        if as_json:
            print(json.dumps(asdict(row)), flush=True)
        else:
            shown = asdict(row) | {"same": "yes" if row.same else "NO"}
            name = row.fault if row.happened else f"{row.fault} (DID NOT HAPPEN)"
            values = [shown[key] for key in ("starts", "steps", "episodes", "void", "same", "back")]
            print(line.format(name, *values, f"{row.seconds:.0f}"), flush=True)
    return right


def measure(fault: Fault, folder: Path) -> Row:
    """Make a run with a fault.

    Args:
        fault: what goes wrong.
        folder: an empty one, for the run and all that is written on the way.

    Returns:
        What became of it.
    """
    start = time.monotonic()
    happened = folder / "happened"
    with ExitStack() as stack:
        search = stack.enter_context(_search_engine(fault, happened))
        urls = [
            stack.enter_context(_server(folder, i, fault.server if i == 0 else ""))
            for i in range(2)
        ]
        words = _words(folder, search, urls)
        starts = 1
        status = _train(folder, fault, words)
        if fault.disk:
            starts += 1
            happened.touch() if status else None
            status = _train(folder, Fault(fault.name), words)
    if status:
        log = (folder / "log").read_text(encoding="utf-8", errors="replace")
        said = [line for line in log.splitlines() if "research-agent: error" in line]
        raise RuntimeError(f"the run failed: {said or log[-4000:]}")
    learned, void = _learned(folder / "run")
    back = sum(len(file.read_text().splitlines()) for file in folder.glob("turns-0-[1-9]*"))
    return Row(
        fault.name,
        happened=happened.exists() or fault.name == "none",
        starts=starts + fault.rank.count("dies"),
        steps=len(learned),
        episodes=sum(map(len, learned.values())),
        void=void,
        same=learned == EXPECTED,
        back=back,
        seconds=time.monotonic() - start,
    )


def _words(folder: Path, search: str, urls: Sequence[str]) -> list[str]:
    """The command of the run."""
    flags = {
        "--output": folder / "run",
        "--engine": f"server:{','.join(urls)}",
        "--steps": STEPS,
        "--prompts-per-step": PROMPTS,
        "--group-size": SAMPLES,
        "--learning-rate": 1e-5,
        "--save-every": 2,
        "--eval-every": 0,
        "--log-episodes": 10**6,
        "--device": "cpu",
        "--env-args": f"retriever={search}",
    }
    return ["train", "miniworld", "--quiet", *(str(w) for pair in flags.items() for w in pair)]


def _train(folder: Path, fault: Fault, words: Sequence[str]) -> int:
    """Run the command on two ranks; returns the exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [
        f"--max-restarts={int(fault.rank == 'dies')}",
        "-m",
        "benchmarks.distributed_faults",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    with (folder / "log").open("ab") as log:
        done = subprocess.run(
            [*command, "rank", fault.rank, str(int(fault.disk)), str(folder / "happened"), *words],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            timeout=600,
            check=False,
        )
    return done.returncode


def _learned(run: Path) -> tuple[Learned, int]:
    """What each step of a run learned from, and the number of void episodes."""
    learned: Learned = {}
    void = 0
    for line in (run / "trajectories.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("void"):
            void += 1
            continue
        learned.setdefault(record["step"], []).append((record["episode"], record["sample"]))
    return {step: sorted(episodes) for step, episodes in learned.items()}, void


# --- the servers and the search engine -----------------------------------------------------------


@contextmanager
def _server(folder: Path, number: int, fault: str) -> Iterator[str]:
    """A server in a process of its own, which is started again when it is killed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    over = threading.Event()
    processes: list[subprocess.Popen[bytes]] = []

    def start(fault: str) -> None:
        words = [str(port), fault, str(folder / "happened")]
        words += [str(folder / f"turns-{number}-{len(processes)}"), str(os.getpid())]
        command = [sys.executable, "-m", "benchmarks.distributed_faults", "server", *words]
        processes.append(subprocess.Popen(command, cwd=ROOT, start_new_session=True))

    def watch() -> None:
        while not over.wait(0.1):
            if processes[-1].poll() is not None:
                start("")

    start(fault)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        _wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        over.set()
        watcher.join()
        processes[-1].kill()
        processes[-1].wait()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("a server does not start")


def _be_server(port: int, fault: str, happened: Path, turns: Path, parent: int) -> None:
    """Answer as a vLLM server, with turns by a script, and be killed where the fault says."""
    from tokenizers import Tokenizer  # noqa: PLC0415

    from tests.research_agent.fake_vllm import FakeVllm, _choice  # noqa: PLC0415

    tokenizer = Tokenizer.from_file(str(STARTER / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    (end,) = encode("</search>")

    def die() -> None:
        happened.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    class Scripted(FakeVllm):
        """Searches once, and then answers, in one of two ways by the seed."""

        loads = 0

        def _turn(self, tokens: list[int], params: dict[str, Any]) -> Any:
            with self.lock, turns.open("a", encoding="utf-8") as file:
                file.write(f"{self.version}\n")
            if fault == "turn" and len(self.turns) > PROMPTS * SAMPLES * 2:
                die()
            searched, seed = end in tokens, params["seed"]
            text = ANSWERS[seed % 2] if searched else SEARCH.format(seed)
            said = [*encode(text), *([END_ID] if searched else [])]
            answer = _choice(said, [-0.25] * len(said), "stop", self.version)
            answer["choices"][0]["stop_reason"] = said[-1] if searched else "</search>"
            return answer

        def _call(self, body: Any) -> Any:
            if "kwargs" in body:  # new weights
                self.loads += 1
                if fault == "weights" and self.loads == 3:
                    die()
            return super()._call(body)

    Scripted(port=port, context=1024, dtype="float32", sizes=SIZES)
    while os.getppid() == parent:  # no server outlives the run
        time.sleep(0.5)


@contextmanager
def _search_engine(fault: Fault, happened: Path) -> Iterator[str]:
    """A retrieval server with MiniWorld's passages, which may go away for a while."""
    from research_env.datasets import load_dataset  # noqa: PLC0415
    from research_env.retrieval import Hit, open_retriever  # noqa: PLC0415
    from research_env.retrieval.serve import RetrievalServer  # noqa: PLC0415

    embedded = open_retriever(None, load_dataset("miniworld", split="train").corpus)
    asked = threading.Event()

    class Counting:
        """Says when the searches of the second step begin."""

        searches = 0

        def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | Any]:
            """Answer every query of a batch."""
            self.searches += len(queries)
            if self.searches > PROMPTS * SAMPLES:
                asked.set()
            return embedded.search(queries, top_k)

        def close(self) -> None:
            """Release nothing."""

    retriever = Counting()
    servers = [RetrievalServer(retriever)]
    port = int(servers[0].url.rpartition(":")[2].partition("/")[0])
    over = threading.Event()

    def go_away() -> None:
        while not asked.wait(0.05):
            if over.is_set():
                return
        servers[0].stop()
        happened.touch()
        over.wait(AWAY)
        servers.append(RetrievalServer(retriever, port=port))

    thread = threading.Thread(target=go_away) if fault.away else None
    try:
        if thread:
            thread.start()
        yield servers[0].url
    finally:
        over.set()
        if thread:
            thread.join()
        servers[-1].stop()
        embedded.close()


# --- the ranks -----------------------------------------------------------------------------------


def _be_rank(fault: str, full: bool, happened: Path, words: Sequence[str]) -> None:
    """Train, as one of the ranks, and fail where the fault says."""
    import torch  # noqa: PLC0415 - slow to import

    from research_agent import checkpoint  # noqa: PLC0415
    from research_agent.cli import main  # noqa: PLC0415
    from research_agent.learner import Learner  # noqa: PLC0415

    torch.set_num_threads(1)
    is_last = os.environ["RANK"] == "1"
    update, save = Learner.update, checkpoint.save

    def update_or_die(self: Any, groups: Any) -> Any:
        is_third = groups[0].episode // PROMPTS == 2
        if fault == "dies" and is_last and is_third and not happened.exists():
            happened.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, groups)

    def save_on_a_full_disk(root: Path, step: int, **given: Any) -> Any:
        """Let no file grow beyond some bytes: writing then fails as on a full disk."""
        if full and is_last:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        return save(root, step, **given)

    Learner.update = update_or_die  # type: ignore[method-assign]
    checkpoint.save = save_on_a_full_disk
    main(words)


if __name__ == "__main__":
    if sys.argv[1] == "server":
        _be_server(
            int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]), int(sys.argv[6])
        )
    else:
        _be_rank(sys.argv[2], sys.argv[3] == "1", Path(sys.argv[4]), sys.argv[5:])
