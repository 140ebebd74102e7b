"""verifiers: its own evaluation plays the environment's episodes against OpenAI endpoints.

Run by ``make adapters-verifiers``, in an environment of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import verifiers.v1 as vf
from verifiers.v1.clients import ModelContext
from verifiers.v1.utils.loaders import load_environment, resolve_env_config

import research_env_verifiers
from research_env.adapters.shared import share, shared_sessions
from research_env.errors import ConfigurationError, UnknownNameError
from research_env.sessions import Sessions
from research_env.testing import Played, conformance
from tests.blocks import block_of
from tests.research_env.fakes import DATASET, answer, search, suite_sessions
from tests.research_env.fakes import Engine as Fake
from tests.research_env.servers import Call, Reply, Server, as_json, serving

ROOT = Path(__file__).resolve().parents[4]
PLUGIN = research_env_verifiers.__name__
# The documentation has the same arguments.
ARGS: Any = {"dataset": "miniworld", "template": "question", "top_k": 1}


def completion(text: str, finish_reason: str = "stop", **message: Any) -> Reply:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **message},
        "finish_reason": finish_reason,
    }
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "fake"}
    return as_json({**body, "choices": [choice], "usage": usage})


class Endpoint:
    """Says the actions of the scripts, each by its prompt; then its budget of tokens is spent."""

    def __init__(self) -> None:
        self.scripts: dict[str, Sequence[str]] = {}
        self.fails = 0
        self.asked: list[Any] = []

    def __call__(self, call: Call) -> Reply:
        body = call.json()
        self.asked.append(body)
        if self.fails:
            self.fails -= 1
            return as_json({"error": {"message": "busy"}}, 500)
        script = self.scripts.get(body["messages"][0]["content"])
        if script is None:
            return as_json({"error": {"message": "no script"}}, 400)
        turn = sum(message["role"] == "assistant" for message in body["messages"])
        return completion(script[turn]) if turn < len(script) else completion("", "length")


class World:
    """verifiers' environment, served in an event loop of its own."""

    def __init__(self, server: Server, args: Mapping[str, Any], **config: Any) -> None:
        self.endpoint = server.url
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        taskset = {"id": PLUGIN, "args": dict(args), **config.pop("taskset", {})}
        self.env = load_environment(resolve_env_config({"taskset": taskset, **config}))
        self.serving = self.env.serving()
        self.run(self.serving.__aenter__())
        self.tasks = {task.data.question_id: task for task in self.env.taskset}

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)

    def episode(self, question_id: str) -> Any:
        """One episode, as verifiers' evaluation runs it."""
        context = ModelContext(
            model="fake",
            client=vf.EvalClientConfig(base_url=f"{self.endpoint}/v1", api_key_var="NONE"),
            sampling=vf.SamplingConfig(temperature=1.0),
        )
        (slot,) = self.env.slots(self.tasks[question_id], 1)
        return self.run(self.env.run_slot(slot, context))

    def close(self) -> None:
        self.run(self.serving.__aexit__(None, None, None))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@contextmanager
def world(endpoint: Endpoint, sessions: Sessions, **config: Any) -> Iterator[World]:
    args = {"shared": f"sessions {id(sessions)}"}
    share(sessions, **args)
    with serving(endpoint) as server:
        made = World(server, args, **config)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint()


@pytest.fixture
def sessions() -> Iterator[Sessions]:
    with Sessions(dataset=DATASET, retriever=Fake(), template="question") as made:
        yield made


def texts(trace: Any, *, sampled: bool) -> list[str]:
    return [node.message.content or "" for node in trace.nodes if node.sampled == sampled]


def test_it_conforms_in_its_own_rollouts(endpoint: Endpoint) -> None:
    with suite_sessions() as (sessions, engine), world(endpoint, sessions) as played_in:
        prompts = {row["id"]: row["prompt"] for row in sessions.tasks()}

        def play(question_id: str, actions: Sequence[str]) -> Played:
            endpoint.scripts[prompts[question_id]] = actions
            episode = played_in.episode(question_id)
            (trace,) = episode.traces
            prompt, *observations = texts(trace, sampled=False)
            void = [error.type for error in trace.errors] == ["TaskError"]
            assert episode.ok == (not void)
            return Played(
                prompt,
                observations,
                None if void else trace.reward,
                trace.metrics,
                void,
                kept="".join(texts(trace, sampled=True)),
                masked="".join(observations),
            )

        conformance(play, engine)


def test_each_turn_is_sampled_up_to_the_terminators(endpoint: Endpoint, sessions: Sessions) -> None:
    endpoint.scripts["Who founded company 3?\n"] = (search("3"), answer("Founder 3"))
    agent = {"sampling": {"temperature": 0.5, "max_tokens": 99}}
    with world(endpoint, sessions, agent=agent) as played_in:
        (trace,) = played_in.episode("q3").traces
    assert (trace.reward, trace.stop_condition) == (1.0, "agent_completed")
    first, second = endpoint.asked
    for body in endpoint.asked:
        assert (body["stop"], body["include_stop_str_in_output"]) == (["</search>"], True)
        assert (body["temperature"], body["max_tokens"], body["model"]) == (0.5, 99, "fake")
    assert first["messages"] == [{"role": "user", "content": "Who founded company 3?\n"}]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert "About 3 number 3." in second["messages"][2]["content"]


def test_a_limit_of_verifiers_truncates_and_scores(endpoint: Endpoint, sessions: Sessions) -> None:
    endpoint.scripts["Who founded company 3?\n"] = (search("3"), answer("Founder 3"))
    with world(endpoint, sessions, agent={"max_turns": 1}) as played_in:
        episode = played_in.episode("q3")
        (trace,) = episode.traces
    assert (episode.ok, trace.stop_condition, trace.reward) == (True, "max_turns", 0.0)
    assert trace.info["research_env"]["stop_reason"] == "length"
    assert (trace.metrics["searches"], trace.metrics["support_recall"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("turns", "reward", "reason"),
    [
        ([(search("3"), "stop"), (answer("Founder 3") + " Well, well", "length")], 1.0, "answer"),
        ([(search("3"), "length")], 0.0, "length"),
    ],
)
def test_a_turn_that_the_endpoint_cuts_is_the_last_and_scored(
    sessions: Sessions, turns: list[tuple[str, str]], reward: float, reason: str
) -> None:
    left = list(turns)
    with (
        world(Endpoint(), sessions) as played_in,
        serving(lambda call: completion(*left.pop(0))) as server,
    ):
        played_in.endpoint = server.url
        episode = played_in.episode("q3")
    (trace,) = episode.traces
    assert (episode.ok, trace.reward, trace.metrics["searches"]) == (True, reward, 1.0)
    assert trace.info["research_env"]["stop_reason"] == reason
    assert not left


def test_reasoning_that_the_server_splits_off_counts_for_the_format(sessions: Sessions) -> None:
    with world(Endpoint(), sessions) as played_in:
        said = completion(r"<answer>It is \boxed{Founder 2}</answer>", reasoning_content="I know.")
        with serving(lambda call: said) as server:
            played_in.endpoint = server.url
            (trace,) = played_in.episode("q2").traces
    assert (trace.reward, trace.metrics["format"]) == (1.0, 1.0)


def test_an_endpoint_that_fails_is_asked_again_and_then_not_scored(
    endpoint: Endpoint, sessions: Sessions
) -> None:
    endpoint.scripts["Who founded company 3?\n"] = (answer("Founder 3"),)
    with world(endpoint, sessions) as played_in:
        endpoint.fails = 1
        assert played_in.episode("q3").traces[0].reward == 1.0
        endpoint.scripts.clear()
        episode = played_in.episode("q3")
    assert not episode.ok
    assert episode.traces[0].errors


def test_the_taskset_is_the_order_of_the_seed(endpoint: Endpoint, sessions: Sessions) -> None:
    with world(endpoint, sessions, taskset={"seed": 4}) as played_in:
        tasks = list(played_in.env.taskset)
    rows = sessions.tasks(seed=4)
    assert [task.key for task in tasks] == [row["id"] for row in rows]
    assert [task.data.prompt[0].content for task in tasks] == [row["prompt"] for row in rows]


def test_settings_that_cannot_be_used_are_refused(sessions: Sessions, tmp_path: Path) -> None:
    share(sessions, shared="refused")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Be brief.")
    taskset = {"id": PLUGIN, "args": {"shared": "refused"}, "system_prompt": str(prompt)}
    env = load_environment(resolve_env_config({"taskset": taskset}))
    with pytest.raises(ConfigurationError, match=r"prompt\.txt' is not used: set a prompt"):
        list(env.taskset)
    with pytest.raises(UnknownNameError, match="nowhere"):
        shared_sessions({"dataset": "nowhere"})


def test_tool_calls_of_the_endpoint_are_the_policys_turn() -> None:
    made = {"name": "search", "arguments": '{"query": "3"}'}
    call = {"id": "call-1", "type": "function", "function": made}
    asked: list[Any] = []

    def reply(request: Call) -> Reply:
        asked.append(request.json())
        if len(asked) == 1:
            return completion("I look it up.", "tool_calls", tool_calls=[call])
        return completion(r"It is \boxed{Founder 3}.")

    rules: Any = {"protocol": "tool-calls", "template": "instruct"}
    with (
        Sessions(dataset=DATASET, retriever=Fake(), **rules) as sessions,
        world(Endpoint(), sessions) as played_in,
        serving(reply) as server,
    ):
        played_in.endpoint = server.url
        (trace,) = played_in.episode("q3").traces
        tools = sessions.open("q3").info["tools"]
    assert (trace.metrics["em"], trace.metrics["searches"]) == (1.0, 1.0)
    assert [tool["function"]["name"] for tool in asked[0]["tools"]] == ["search"]
    assert asked[0]["tools"] == tools
    assert "stop" not in asked[0]
    result = asked[1]["messages"][-1]
    assert (result["role"], result["tool_call_id"]) == ("tool", "call-1")
    assert "About 3 number 3." in result["content"]


def arguments(query: str) -> str:
    return json.dumps({"query": query})


@pytest.mark.parametrize(
    ("turns", "ids", "queries"),
    [
        ([[("call_0", arguments("3"))], [("call_0", arguments("2"))]], None, {"3", "2"}),
        ([[("c", arguments("3")), ("c", arguments("2"))]], ["call_0_0", "call_0_1"], {"3", "2"}),
        ([[("", arguments("3"))]], ["call_0_0"], {"3"}),
        ([[("a", '{"query": "3"'), ("b", '["3"]'), ("c", arguments("2"))]], None, {"2"}),
    ],
)
def test_an_endpoint_can_take_back_every_call_that_it_made(
    turns: list[list[tuple[str, str]]], ids: list[str] | None, queries: set[str]
) -> None:
    asked: list[Any] = []

    def reply(request: Call) -> Reply:
        messages = request.json()["messages"]
        asked.append(messages)
        said = sum(message["role"] == "assistant" for message in messages)
        if said == len(turns):
            return completion(r"It is \boxed{Founder 3}.")
        calls = [
            {"id": each, "type": "function", "function": {"name": "search", "arguments": given}}
            for each, given in turns[said]
        ]
        return completion("", "tool_calls", tool_calls=calls)

    rules: Any = {"protocol": "tool-calls", "template": "instruct"}
    engine = Fake()
    with (
        Sessions(dataset=DATASET, retriever=engine, **rules) as sessions,
        world(Endpoint(), sessions) as played_in,
        serving(reply) as server,
    ):
        played_in.endpoint = server.url
        (trace,) = played_in.episode("q3").traces
    assert (trace.reward, {query for batch in engine.batches for query in batch}) == (1.0, queries)
    said = [message for message in asked[-1] if message["role"] == "assistant"]
    calls = [call for message in said for call in message["tool_calls"]]
    results = [message for message in asked[-1] if message["role"] == "tool"]
    given = [each for turn in turns for each, _ in turn]
    assert [call["id"] for call in calls] == (ids or given)
    assert [result["tool_call_id"] for result in results] == (ids or given)
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)
    errors = [result["content"].startswith("error: ") for result in results]
    right = [arguments(query) for query in queries]
    assert errors == [given not in right for turn in turns for _, given in turn]
    # A message that comes back unchanged stays the turn that was sampled.
    sampled = [node.sampled for node in trace.nodes if node.message.role == "assistant"]
    assert all(sampled) == (ids is None and not any(errors))


def evaluate(url: str, model: str, output: Path, *more: str) -> list[Any]:
    """Run the documented command for an endpoint; the episodes that it saved."""
    words = shlex.split(block_of("verifiers and prime-rl", "bash").replace("\\\n", " "))
    name = "vf-eval" if version("verifiers").startswith("0.4") else "eval"
    command = [str(Path(sys.executable).with_name(name)), *words[1:]]
    command[command.index("MODEL")] = model
    command[command.index("http://localhost:8000/v1")] = url
    env = os.environ | {"PYTHONPATH": str(ROOT), "RESEARCH_CACHE": str(output.parent / "cache")}
    done = subprocess.run(
        [*command, "--output-dir", str(output), *more],
        env=env,
        cwd=output.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (traces,) = output.glob("*/traces.jsonl")
    return [json.loads(line) for line in traces.read_text(encoding="utf-8").splitlines()]


def test_its_command_evaluates_against_an_endpoint(tmp_path: Path) -> None:
    def reply(call: Call) -> Reply:
        messages = call.json()["messages"]
        question = messages[0]["content"].strip()
        return completion(search(question) if len(messages) == 1 else answer("nobody"))

    with serving(reply) as server:
        episodes = evaluate(f"{server.url}/v1", "fake", tmp_path / "out")
    with Sessions(**ARGS) as sessions:
        asked = [row["id"] for row in sessions.tasks()[:4]]
    assert sorted(episode["task"]["key"] for episode in episodes) == sorted(asked * 2)
    for episode in episodes:
        (trace,) = episode["traces"]
        assert (episode["ok"], trace["metrics"]["searches"], trace["metrics"]["em"]) == (True, 1, 0)
        assert trace["info"]["research_env"]["reward"] == 0.1
        assert [node["message"]["role"] for node in trace["nodes"]] == ["user", "assistant"] * 2


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[str]:
    """The address of a real vLLM server, from the main environment, with the starter."""
    python = os.environ.get("MAIN_PYTHON")
    if not python:
        if os.environ.get("CI") == "true":
            pytest.fail("MAIN_PYTHON must name the Python of an environment with vLLM")
        pytest.skip("MAIN_PYTHON names no Python of an environment with vLLM")
    code = (
        "import shutil, sys, pathlib\n"
        "from research_agent.models.source import resolve_model\n"
        "from tests.vllm_server import serving\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "shutil.copytree(resolve_model('miniworld-starter'), folder)\n"
        "template = '{% for message in messages %}{{ message.content }}{% endfor %}'\n"
        "(folder / 'chat_template.jinja').write_text(template)\n"
        "with serving(folder) as url:\n"
        "    print(url, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [python, "-c", code, str(tmp_path / "model")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
        process.wait(60)
    shutil.rmtree(tmp_path / "model", ignore_errors=True)


def test_its_command_evaluates_a_model_on_a_real_vllm_server(vllm: str, tmp_path: Path) -> None:
    sampling = ("--sampling.max-tokens", "60", "--sampling.temperature", "1")
    episodes = evaluate(vllm, "model", tmp_path / "out", *sampling)
    assert len(episodes) == 8
    with Sessions(**ARGS) as sessions:
        for episode in episodes:
            (trace,) = episode["traces"]
            assert episode["ok"], trace["errors"]
            played = trace["info"]["research_env"]
            said = [node["message"]["content"] for node in trace["nodes"] if node.get("sampled")]
            session = sessions.open(episode["task"]["key"])
            outputs = [session.step(text) for text in said]
            if not session.episode.over:
                outputs.append(session.truncate("length"))
            assert played["reward"] == outputs[-1].reward
            assert played["metrics"] == outputs[-1].info["metrics"]
