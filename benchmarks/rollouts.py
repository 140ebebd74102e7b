"""How fast episodes are played: the race against TRL, and what the collector itself costs.

``python -m benchmarks.rollouts [--latencies 0 50 500] [--episodes 32] [--rounds 3] [--json]``
``python -m benchmarks.rollouts client`` measures only what a turn costs the client of vLLM servers
(``client_rate.py``).

Competitors take turns in one process; rates are medians of the rounds.

A. Trajectories per second against TRL's GRPOTrainer with ``tools=[search]``. An episode has three
   turns of a thought and a tool call, each answered by a search, and a last turn of plain text;
   turns are as long in tokens as those of R1-Searcher's model on HotpotQA. Both sides play one
   script with the same small policy (random weights, float32, transformers): forward passes and
   sampling are real, then the script's token replaces the sampled one. Prompts, actions and results
   have the same numbers of tokens on both sides (ours writes a plain character for a special token
   of the chat template). TRL's ``generate`` samples as many tokens as the longest turn of its batch
   has, because it ends with its last row. Its batch has all episodes, or half of them; bfloat16, a
   static cache and continuous batching were slower. A request takes the latency, however many
   queries it holds: our environment has one request under way at a time, TRL calls its tool once
   per sample and waits for it. Timed are ``_generate`` and ``collect``, without scoring and
   learning. TRL with ``use_vllm=True`` does not run on a CPU: it calls ``load_weights`` on a live
   vLLM model, whose linear layers have been packed for the CPU.
B. Tokens per second of the vllm engine within the collector, against ``LLM.generate`` of the same
   LLM on the same prompts without an environment: turns of equal length, all prompts together once
   per turn, the results appended. ``generate`` is asked for what the engine asks for
   (log-probabilities, a seed per prompt), and for less; the target is for the former.
C. Microseconds per turn of the collector: an engine that plays a script, and environments that
   answer at once with 256 tokens. "whole" is all of it, "collector" leaves out what happens inside
   those two, and "tokenizer" is the part of "collector" in which prompts and results are encoded.
D. The share of slots x wall time in which a slot is empty while it has work. A slot is empty until
   its next turn is submitted: since its search was answered, or since its last episode ended. Time
   counts until the last episode begins. While a search is under way the slot holds a trajectory and
   is not empty; that share is "searching". There are a quarter as many slots as episodes, and
   searches take 50 ms.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any
from unittest import mock

import torch

from benchmarks.client_rate import TARGET_MILLISECONDS, client_rate
from benchmarks.rollout_competitors import (
    CONTEXT,
    LIMITS,
    RESULT,
    SAMPLES,
    TURNS,
    Ours,
    Search,
    Theirs,
    clock,
    make_policy,
    make_renderer,
    make_script,
    query,
)
from research_agent.engines import make_engine
from research_agent.engines.scripted import ScriptedEngine
from research_agent.environments import Action, StepResult
from research_agent.errors import EngineError
from research_agent.rollout import collect
from research_agent.trace import TracedEngine, TracedEnvironments

TARGET_SPEED = {0: 1.0, 50: 3.0, 500: 3.0}  # by milliseconds of latency
TARGET_ENGINE = 0.9
TARGET_MICROSECONDS = 100.0
TARGET_EMPTY = 0.02


def medians(competitors: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """What each returned, by turns: its median."""
    rows = [{name: play() for name, play in competitors.items()} for _ in range(rounds)]
    return {name: median(row[name] for row in rows) for name in competitors}


def compared(rates: dict[str, float]) -> dict[str, dict[str, float]]:
    """Rates, and ours against each."""
    ratios = {name: rates["ours"] / rate for name, rate in rates.items() if name != "ours"}
    return {"rates": rates, "ratios": ratios}


def race(latencies: Sequence[int], episodes: int, rounds: int, scale: float = 1.0) -> Any:
    """Part A: the tokens of a round by provenance, and trajectories per second by latency."""
    renderer, search = make_renderer(), Search()
    parts = make_policy(renderer), renderer, make_script(episodes, renderer, scale), search
    policy, _, script, _ = parts
    first = Theirs(*parts, batch=episodes, waits=False)
    ours = Ours(policy, renderer, first.prompts, script, search)
    competitors: dict[str, Ours | Theirs] = {
        "ours": ours,
        "TRL": first,
        "TRL, async tool": Theirs(*parts, batch=episodes, waits=True),
        "TRL, two batches": Theirs(*parts, batch=max(SAMPLES, episodes // 2), waits=False),
    }
    tokens = {}
    for name, competitor in competitors.items():
        competitor.play()  # to warm up
        if competitor.tokens("action") != [turns[turns >= 0].tolist() for turns in script]:
            raise RuntimeError(f"{name} did not play the script")
        kinds = ("prompt", "action", "observation")
        tokens[name] = {kind: sum(map(len, competitor.tokens(kind))) for kind in kinds}
    rows = {}
    for latency in latencies:
        search.seconds = latency / 1000
        seconds = medians(
            {name: competitor.play for name, competitor in competitors.items()}, rounds
        )
        rows[latency] = compared({name: episodes / each for name, each in seconds.items()})
    ours.environments.close()
    return {"tokens": tokens, "by_latency_ms": rows}


class AtOnce:
    """Environments that answer at once, ``TURNS`` turns per episode."""

    num_tasks: int | None = None
    terminators: tuple[str, ...] = ()

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self._taken = [0] * num_envs
        self._ready: list[StepResult] = []

    def reset(
        self, assignments: Mapping[int, int], seed: int
    ) -> dict[int, tuple[str, Mapping[str, Any]]]:
        """Begin episodes."""
        for i in assignments:
            self._taken[i] = 0
        return {i: (f"{number}. {RESULT}", {}) for i, number in assignments.items()}

    def send(self, env_ids: Sequence[int], actions: Sequence[Action]) -> None:
        """Take actions."""
        for i in env_ids:
            self._taken[i] += 1
            over = self._taken[i] == TURNS
            self._ready.append(StepResult(i, "" if over else RESULT, 0.0, over, False, {}))

    def recv(self, min_results: int) -> list[StepResult]:
        """All results."""
        results, self._ready = self._ready, []
        return results

    def close(self) -> None:
        """Nothing is held."""


def engine_share(slots: int, rounds: int, length: int = 64) -> dict[str, Any]:
    """Part B, turns of ``length`` tokens: the tokens of a round, and tokens per second."""
    import vllm  # noqa: PLC0415

    renderer, environments = make_renderer(), AtOnce(slots)
    policy = make_policy(renderer)
    with torch.no_grad():  # so sharp that the end token, whose logit is 0, is never sampled
        weight = policy.get_output_embeddings().weight
        weight *= 50
        weight[list(renderer.end_ids)] = 0
    real: Any = vllm.LLM
    made: list[Any] = []

    def make(*args: Any, **settings: Any) -> Any:
        made.append(real(*args, **settings))
        return made[0]

    with mock.patch("vllm.LLM", make):
        engine: Any = make_engine("vllm", policy, renderer, max_slots=slots, max_context=CONTEXT)
    limits = replace(LIMITS, max_turn_tokens=length)
    result = renderer.encode_text(RESULT)
    tokens: dict[str, int] = {}

    def ours() -> float:
        begin = clock()
        played = collect(engine, environments, renderer, [(i, 0) for i in range(slots)], limits)
        seconds = clock() - begin
        tokens["ours"] = sum(t.num_action_tokens for t in played)
        return seconds

    def theirs(name: str, seeded: bool, **settings: Any) -> float:
        settings |= {"max_tokens": length, "ignore_eos": True, "detokenize": False}
        asked = [vllm.SamplingParams(seed=i if seeded else None, **settings) for i in range(slots)]
        started = environments.reset({i: i for i in range(slots)}, 0)
        prompts = [renderer.encode_prompt(started[i][0]) for i in range(slots)]
        made[0].reset_prefix_cache()
        seconds, tokens[name] = 0.0, 0
        for _ in range(TURNS):
            given = [{"prompt_token_ids": prompt} for prompt in prompts]
            begin = clock()
            outputs = made[0].generate(given, asked, use_tqdm=False)
            seconds += clock() - begin
            said = [output.outputs[0].token_ids for output in outputs]
            tokens[name] += sum(map(len, said))
            prompts = [[*p, *s, *result] for p, s in zip(prompts, said, strict=True)]
        return seconds

    logged = {"logprobs": 0, "flat_logprobs": True}
    competitors: dict[str, Callable[[], float]] = {
        "ours": ours,
        "generate": partial(theirs, "generate", True, **logged),
        "without seeds": partial(theirs, "without seeds", False, **logged),
        "without both": partial(theirs, "without both", False),
    }
    medians(competitors, 1)  # to warm up
    seconds = medians(competitors, rounds)
    engine.close()
    return {"tokens": tokens, **compared({n: tokens[n] / each for n, each in seconds.items()})}


def overhead(slots: int, episodes: int, rounds: int) -> dict[str, float]:
    """Part C: microseconds per turn."""
    renderer, environments = make_renderer(), AtOnce(slots)
    said = [*renderer.encode_text("I should look for it."), *renderer.end_ids]
    engine = ScriptedEngine(lambda *_: said, renderer, CONTEXT)
    spent = dict.fromkeys(("whole", "parts", "tokenizer"), 0.0)

    def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            begin = clock()
            result = function(*args)
            spent[what] += clock() - begin
            return result

        return run

    for part, names in ((engine, "submit step release"), (environments, "reset send recv")):
        for name in names.split():
            setattr(part, name, timed("parts", getattr(part, name)))
    object.__setattr__(renderer, "encode_text", timed("tokenizer", renderer.encode_text))
    whole = timed("whole", collect)
    asked = [(i, 0) for i in range(episodes)]
    rows = []
    for _ in range(rounds + 1):  # the first is a warm-up
        spent |= dict.fromkeys(spent, 0.0)
        whole(engine, environments, renderer, asked, LIMITS)
        rows.append({**spent, "collector": spent["whole"] - spent["parts"]})
    turns = episodes * TURNS / 1e6
    kinds = ("whole", "collector", "tokenizer")
    return {kind: median(row[kind] for row in rows[1:]) / turns for kind in kinds}


class Log:
    """What a trace would show of one round, in the order in which it ended."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, int, float, bool]] = []  # what, slot, begin, over

    def add(self, name: str, row: int, begin: float, **details: Any) -> None:
        """Keep a span of a slot, whose row is its number and 1."""
        if row:
            self.spans.append((name, row - 1, begin, bool(details.get("over"))))


def slot_shares(
    log: Log, answered: Mapping[int, Sequence[float]], slots: int, begin: float
) -> dict[str, float]:
    """Which shares of the slots' time, until the last episode begins, are "empty" and "searching".

    Args:
        log: turns, from when they were submitted, and environments, from when they got an action.
        answered: when the searches of each slot were answered, in order.
        slots: how many there are.
        begin: beginning of the collection, in seconds as all times are.
    """
    ready = dict.fromkeys(range(slots), begin)  # when the work of an empty slot was
    fresh = set(ready)  # slots whose next turn is the first of an episode
    times = {slot: iter(each) for slot, each in answered.items()}
    spans: dict[str, list[tuple[float, float]]] = {"empty": [], "searching": []}
    end = begin
    for name, slot, start, over in log.spans:
        if name == "generate":
            spans["empty"].append((ready[slot], start))
            if slot in fresh:
                fresh.discard(slot)
                end = max(end, start)
        elif over:
            ready[slot] = start
            fresh.add(slot)
        else:
            ready[slot] = next(times[slot])
            spans["searching"].append((start, ready[slot]))
    whole = slots * (end - begin)
    return {k: sum(max(0.0, min(b, end) - a) for a, b in v) / whole for k, v in spans.items()}


def empty_slots(episodes: int, rounds: int, seconds: float, scale: float = 1.0) -> dict[str, float]:
    """Part D, with searches of so many seconds."""
    renderer, search, slots = make_renderer(), Search(seconds), max(1, episodes // 4)
    prompts = [f"{RESULT} Who founded company {i}?" for i in range(episodes // SAMPLES)]
    ours = Ours(
        make_policy(renderer), renderer, prompts, make_script(slots, renderer, scale), search
    )
    engine, environments = ours.engine, ours.environments
    rows = []
    for _ in range(rounds + 1):
        log: Any = Log()
        ours.engine = TracedEngine(engine, log)
        ours.environments = TracedEnvironments(environments, log)
        times = search.answered = {}
        begin = clock()
        ours.play()
        answered = {
            slot: sorted(t for turn in range(TURNS - 1) for t in times[query(slot, turn)])
            for slot in range(slots)
        }
        rows.append(slot_shares(log, answered, slots, begin))
    environments.close()
    return {name: median(row[name] for row in rows[1:]) for name in rows[0]}


def run(latencies: Sequence[int], episodes: int, rounds: int) -> dict[str, Any]:
    """All parts that can be run here, and whether the targets are met."""
    missing = [name for name in ("trl", "vllm") if not find_spec(name)]
    result: dict[str, Any] = {"missing": missing}
    met: dict[str, bool] = {}
    if "trl" not in missing:
        result["race"] = race(latencies, episodes, rounds)
        for latency, row in result["race"]["by_latency_ms"].items():
            if target := TARGET_SPEED.get(latency):
                met[f"TRL, {latency} ms: {target:g}x"] = min(row["ratios"].values()) >= target
    overheads = {slots: overhead(slots, max(slots, 1024), rounds) for slots in (64, 4096)}
    met[f"overhead: {TARGET_MICROSECONDS:g} us"] = all(
        row["collector"] <= TARGET_MICROSECONDS for row in overheads.values()
    )
    empty = empty_slots(episodes, rounds, 0.05)
    met[f"empty slots: {TARGET_EMPTY:.0%}"] = empty["empty"] <= TARGET_EMPTY
    result |= {"overhead_us": overheads, "slots": empty}
    if "vllm" not in missing:  # last, as it changes the number of torch's threads
        try:
            result["engine"] = engine_share(64, rounds)
        except EngineError as error:  # the other parts have taken minutes
            result["engine"] = {"error": str(error)}
        ratio = result["engine"].get("ratios", {"generate": 0.0})["generate"]
        met[f"generate: {TARGET_ENGINE:.0%}"] = ratio >= TARGET_ENGINE
    return {**result, "met": met}


def main() -> None:
    """Print the numbers, a line each, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", nargs="?", choices=["all", "client"], default="all")
    parser.add_argument("--turns", type=int, default=4096, help="turns of the client's part")
    parser.add_argument("--in-flight", type=int, default=1024, help="turns, in the client's part")
    parser.add_argument("--latencies", type=int, nargs="+", default=[0, 50, 500], help="in ms")
    parser.add_argument("--episodes", type=int, default=32, help="multiple of 4, per round")
    parser.add_argument("--rounds", type=int, default=3, help="take the medians of so many")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    arguments = parser.parse_args()
    if arguments.episodes < 4 or arguments.episodes % 4:
        parser.error(f"--episodes {arguments.episodes}: give a multiple of 4")
    if arguments.part == "client":
        _print_client(client_rate(arguments.turns, arguments.in_flight), arguments)
        return
    result = run(arguments.latencies, arguments.episodes, arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for part in result["missing"]:
        print(f"not installed: {part}, so its part is left out; see the extras of pyproject.toml")
    if error := result.get("engine", {}).get("error"):
        print(f"the vllm engine failed: {error}")
    for part in ("race", "engine"):
        for name, tokens in result.get(part, {}).get("tokens", {}).items():
            print(f"{part}, tokens per round: {name}: {tokens}")
    races = result.get("race", {}).get("by_latency_ms", {})
    tables = {f"trajectories/s, {latency} ms": row for latency, row in races.items()}
    tables |= {"engine, tokens/s": result.get("engine", {})}
    for title, row in tables.items():
        for name, rate in row.get("rates", {}).items():
            ratio = f"  ours / this {row['ratios'][name]:.2f}" if name != "ours" else ""
            print(f"{title:24}{name:20}{rate:12.2f}{ratio}")
    for slots, microseconds in result["overhead_us"].items():
        shown = ", ".join(f"{kind} {each:.1f}" for kind, each in microseconds.items())
        print(f"microseconds per turn, {slots} slots: {shown}")
    print("slots: " + ", ".join(f"{kind} {each:.2%}" for kind, each in result["slots"].items()))
    for target, reached in result["met"].items():
        print(f"{target}: {'met' if reached else 'MISSED'}")


def _print_client(costs: dict[str, float], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(costs, indent=2))
        return
    print(
        f"client, {arguments.in_flight} turns in flight: {costs['milliseconds']:.2f} ms of CPU per "
        f"turn, {costs['turns_per_second']:.0f} turns/s"
    )
    reached = "met" if costs["milliseconds"] <= TARGET_MILLISECONDS else "MISSED"
    print(f"client: {TARGET_MILLISECONDS:g} ms: {reached}")


if __name__ == "__main__":
    main()
