"""What a turn on a vLLM server costs the client: CPU time and turns per second of one process.

``python -m benchmarks.rollouts client [--turns 4096] [--in-flight 1024] [--json]``

The server (``turn_server.py``) answers every request at once with the same bytes: a turn in vLLM's
format, with a log-probability per token. The client is the engine itself, from
``submit`` to the completion: seeds, requests, connections, decoding, checks, text. So the figure is
what one rank can take in, and real servers are slower.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.rollout_competitors import make_renderer
from research_agent.engines.base import SamplingParams
from research_agent.engines.servers.engine import ServerEngine
from research_agent.engines.servers.pool import ServedWeights
from research_agent.engines.servers.server import WeightTag

TARGET_MILLISECONDS = 1.5
TOKENS = 128
"""Tokens of a turn."""
PROMPT = 2000
"""Tokens before it."""

_TAG = WeightTag("run", 1, 1)


def _answer(tokens: list[int]) -> bytes:
    content = [
        {"token": f"token_id:{t}", "token_id": t, "logprob": -0.123, "top_logprobs": []}
        for t in tokens
    ]
    choice = {
        "index": 0,
        "token_ids": tokens,
        "logprobs": {"content": content},
        "finish_reason": "length",
        "stop_reason": None,
        "weight_versions": [{"version": str(_TAG), "start": 0, "end": len(tokens)}],
    }
    body = json.dumps({"request_id": "a", "choices": [choice]}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def client_rate(turns: int, in_flight: int) -> dict[str, float]:
    """Sample so many turns, so many at a time; what each costs.

    Returns:
        "milliseconds" of CPU time per turn, and "turns_per_second".
    """
    renderer = make_renderer()
    letters = renderer.encode_text("the quick brown fox ")
    tokens = (letters * TOKENS)[:TOKENS]
    command = [sys.executable, str(Path(__file__).with_name("turn_server.py"))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    process.stdin.write(_answer(tokens))
    process.stdin.close()
    url = f"http://127.0.0.1:{int(process.stdout.readline())}"
    engine = ServerEngine(renderer, [url], PROMPT + TOKENS + 1, max_in_flight=in_flight)
    engine.load_weights(ServedWeights(_TAG, {}), 1)
    prompt = (letters * PROMPT)[:PROMPT]
    params = SamplingParams(max_tokens=TOKENS, stop=("</search>",))
    try:
        _play(engine, prompt, params, in_flight, in_flight)  # opens the connections
        begin, cpu = time.perf_counter(), time.process_time()
        _play(engine, prompt, params, turns, in_flight)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    finally:
        engine.close()
        process.terminate()
        process.wait()
        process.stdout.close()
    return {"milliseconds": 1000 * cpu / turns, "turns_per_second": turns / seconds}


def _play(
    engine: ServerEngine, prompt: list[int], params: SamplingParams, turns: int, in_flight: int
) -> None:
    free, left = list(range(in_flight)), turns
    while left or engine.busy:
        while free and left:
            engine.submit(free.pop(), prompt, params)
            left -= 1
        for turn in engine.step():
            engine.release(turn.slot)
            free.append(turn.slot)
