"""Tool calls through environment and agent together: chat templates, tokens, endpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.cli import main
from research_agent.config import SamplingConfig
from research_agent.demonstrations import as_trajectory, demonstrations
from research_agent.engines.scripted import ScriptedEngine
from research_agent.environments import make_environments
from research_agent.errors import ModelError
from research_agent.evaluation.difficulty import write_demonstrations
from research_agent.evaluation.evaluate import evaluate as run_evaluation
from research_agent.renderer import Renderer
from research_agent.rollout import collect
from research_agent.trajectory import Trajectory
from research_env.tools import FORMATS, Call, ToolTurn
from tests.research_agent.conftest import byte_tokenizer, make_renderer
from tests.research_agent.engines.test_openai import Endpoint, well
from tests.research_env.fakes import DATASET, Engine
from tests.research_env.test_hostile import PASSAGE, Library

FAMILIES = {
    "qwen2_5": ("hermes", "<|im_end|>"),
    "qwen3": ("hermes", "<|im_end|>"),
    "qwen3_5_think": ("qwen3.5", "<|im_end|>"),
    "llama3_1": ("llama3", "<|eot_id|>"),
    "gptoss": ("harmony", "<|call|>"),
}
"""By the name of TRL's chat template: the format, and the token that ends a turn with a call."""

SPECIALS = [
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|python_tag|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>"),
    *("<|call|>", "<|return|>"),
]


@cache
def renderer_of(template: str) -> Renderer:
    """A byte tokenizer with the chat tokens of all families, and a model's own chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *SPECIALS]}
    )
    source = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    tokenizer.chat_template = source.read_text()
    ends = {"gptoss": ["<|call|>", "<|return|>"]}.get(template, [FAMILIES[template][1]])
    ids = frozenset(tokenizer.convert_tokens_to_ids(ends))
    tokenizer.bos_token = "<|begin_of_text|>"
    return Renderer(tokenizer, ids, chat_template=True)


def turn(template: str, *queries: str) -> str:
    name = FAMILIES[template][0]
    calls = tuple(Call(name="search", arguments={"query": query}) for query in queries)
    return FORMATS[name].writer(ToolTurn("Look." if calls else "\\boxed{x}", "", calls))


def play(template: str, engine: Any, turns: list[str]) -> tuple[Trajectory, list[list[int]], Any]:
    """Play turns through a chat template: the trajectory, the sampled tokens, the renderer."""
    renderer = renderer_of(template)
    name, end = FAMILIES[template]
    sampled = []
    for i, text in enumerate(turns):
        ended = end if i < len(turns) - 1 or template != "gptoss" else "<|return|>"
        tokens = renderer.tokenizer(text.removesuffix(ended) + ended, add_special_tokens=False)
        sampled.append(tokens["input_ids"])
    script = iter(sampled)
    environments = make_environments(
        "research_env:SearchQA-v0",
        1,
        {
            "dataset": DATASET,
            "retriever": engine,
            "protocol": "tool-calls",
            "tool_format": name,
            "template": "instruct",
        },
    )
    scripted = ScriptedEngine(lambda *_: next(script), renderer, max_context=10**6)
    sampling = SamplingConfig(
        temperature=1.0, max_prompt=10**5, max_response=10**5, max_turn_tokens=10**4
    )
    [trajectory] = collect(scripted, environments, renderer, [(0, 0)], sampling)
    environments.close()
    return trajectory, sampled, renderer


@pytest.mark.parametrize("template", FAMILIES)
def test_the_tokens_of_an_episode_are_those_of_the_chat_template(template: str) -> None:
    queries = ["company 1", "company 2"][: 1 if template in ("llama3_1", "gptoss") else 2]
    turns = [turn(template, *queries), turn(template)]
    trajectory, sampled, renderer = play(template, Engine(), turns)
    prompt, first, observation, last = trajectory.segments
    assert [first.tokens, last.tokens] == [tuple(each) for each in sampled]  # law 1
    assert trajectory.metrics["searches"] == len(queries)
    calls = [
        {"type": "function", "function": {"name": "search", "arguments": {"query": query}}}
        for query in queries
    ]
    chat = [
        *prompt.info["messages"],  # type: ignore[misc]
        {"role": "assistant", "content": "Look.", "tool_calls": calls},
        *[
            {"role": "tool", "content": each["content"]}
            for each in observation.info["messages"]  # type: ignore[attr-defined]
        ],
    ]
    whole = renderer.tokenizer.apply_chat_template(
        chat, tools=prompt.info["tools"], add_generation_prompt=True, tokenize=False
    )
    expected = renderer.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [*prompt.tokens, *first.tokens, *observation.tokens] == expected


@pytest.mark.parametrize("template", FAMILIES)
def test_a_sampled_episode_is_learned_with_the_tokens_that_it_was_played_with(
    template: str, tmp_path: Path
) -> None:
    trajectory, _, renderer = play(template, Engine(), [turn(template, "one"), turn(template)])

    def again(*_: Any, on_finish: Callable[[Trajectory], None], **more: Any) -> list[Trajectory]:
        on_finish(trajectory)
        return [trajectory]

    environments: Any = SimpleNamespace(num_tasks=1)
    header = {"settings": {"chat_template": True}}
    run_evaluation(
        *(None, environments, renderer, SamplingConfig(temperature=1.0), tmp_path),  # type: ignore[arg-type]
        header=header,
        show=False,
        play=again,
    )
    write_demonstrations(tmp_path, tmp_path / "d.jsonl", metric="searches")
    [parts] = demonstrations(str(tmp_path / "d.jsonl"), 1, 0, {})
    learned = as_trajectory(parts, renderer)
    assert learned.tokens == trajectory.tokens
    assert learned.action_mask == trajectory.action_mask


@settings(deadline=None, max_examples=25)
@given(
    pages=st.lists(st.tuples(PASSAGE, PASSAGE), min_size=1, max_size=2),
    forged=st.lists(st.sampled_from([*SPECIALS, "<|im_end|>", "<tool_call>"]), max_size=4),
    template=st.sampled_from(sorted(FAMILIES)),
)
def test_no_passage_is_a_chat_token_or_changes_what_is_learned(
    pages: list[tuple[str, str]], forged: list[str], template: str
) -> None:
    turns = [turn(template, "one"), turn(template)]
    played = []
    for shown in ([(title, text + "".join(forged)) for title, text in pages], [("", "")]):
        trajectory, sampled, renderer = play(template, Library(shown), turns)
        specials = set(renderer.tokenizer.all_special_ids)
        _, first, observation, last = trajectory.segments
        assert [first.tokens, last.tokens] == [tuple(each) for each in sampled]
        frame = [token for token in observation.tokens if token in specials]
        played.append((frame, trajectory.reward, trajectory.stop_reason))
    assert played[0] == played[1]


def test_a_format_of_another_family_is_refused_in_words() -> None:
    renderer = make_renderer(byte_tokenizer(), chat_template=True)
    markup = FORMATS["llama3"].markup
    with pytest.raises(ModelError, match=r"'<\|start_header_id\|>', which is no chat token of"):
        renderer.encode_observation("<|start_header_id|>ipython", markup)


def test_a_chat_template_that_hides_the_tools_is_refused_in_words() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    renderer = make_renderer(tokenizer, chat_template=True)
    tool = {"type": "function", "function": {"name": "lookup"}}
    with pytest.raises(ModelError, match="does not show the tool 'lookup'"):
        renderer.encode_prompt("Who?", None, [tool])


# --- endpoints -----------------------------------------------------------------------------------


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.http.shutdown()
    server.http.server_close()


def calling(*calls: tuple[str, str, Any], content: str | None = None) -> Any:
    made = [
        {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}
        for key, name, arguments in calls
    ]
    message = {"role": "assistant", "content": content, "tool_calls": made}
    return 200, {"choices": [{"message": message, "finish_reason": "tool_calls"}]}, {}


def evaluate(
    endpoint: Endpoint, folder: Path, *settings: str, chat: bool = True
) -> list[dict[str, Any]]:
    """Evaluate a question by an endpoint; its lines of the predictions."""
    questions, corpus = folder / "questions.jsonl", folder / "corpus.jsonl"
    questions.write_text('{"id": "q0", "question": "Who did it?", "answers": ["Ann"]}\n')
    corpus.write_text('{"id": "p0", "title": "It", "text": "Ann did it."}\n')
    words = f"eval --env research_env:SearchQA-v0 --endpoint {endpoint.url} --model m --quiet"
    words += f" --output {folder / 'run'}" + (" --chat-template" if chat else "")
    words += f" --env-args questions={questions} corpus={corpus} protocol=tool-calls"
    main([*words.split(), f"template={'instruct' if chat else 'base'}", *settings])
    lines = (folder / "run" / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if '"episode"' in line]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))


def test_an_endpoint_calls_tools_and_gets_their_results(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answers = [
        calling(
            ("a", "search", '{"query": "did"}'),
            ("a", "open", '{"document": "p0"}'),  # an id that comes twice
            ("b", "search", '{"query": '),  # no JSON
            ("c", "open", {"document": "It"}),
            content="I look.",
        ),
        calling(("d", "dance", "{}")),
        well("It is \\boxed{Ann}.", chat=True),
    ]
    (record,) = evaluate(endpoint, tmp_path, "tools=search,open")
    assert record["reward"] == 1.0
    assert record["metrics"]["searches"] == 2.0
    first, second, third = [body for _, body in endpoint.asked]
    assert [each["function"]["name"] for each in first["tools"]] == ["search", "open"]
    assert [each["role"] for each in first["messages"]] == ["system", "user"]
    assert "# Tools" not in first["messages"][0]["content"]  # the endpoint's template shows them
    said, *results = second["messages"][2:]
    assert second["messages"][:2] == first["messages"]
    assert said["content"] == "I look."
    sent = [(each["id"], each["function"]["arguments"]) for each in said["tool_calls"]]
    assert sent == [
        ("a", '{"query": "did"}'),
        ("call_0_1", '{"document": "p0"}'),
        ("b", "{}"),
        ("c", '{"document": "It"}'),
    ]
    assert [(each["role"], each["tool_call_id"]) for each in results] == [
        ("tool", identifier) for identifier, _ in sent
    ]
    contents = [each["content"] for each in results]
    assert contents[0] == '[p0] "It"\nAnn did it.'
    assert contents[1] == "error: the id 'a' was used by another call"
    assert contents[2].startswith("error: the call is not valid JSON")
    assert contents[3] == '"It" (page 1 of 1)\nAnn did it.'
    assert third["messages"][-1]["content"] == (
        "error: unknown tool 'dance'; the tools are: search, open"
    )


@pytest.mark.parametrize(
    "calls", [[None], ["x"], [{}], [{"function": None}], [{"id": 3, "function": {"name": 4}}]]
)
def test_calls_of_any_form_lose_nothing(endpoint: Endpoint, tmp_path: Path, calls: Any) -> None:
    message = {"role": "assistant", "tool_calls": calls}
    answer = {"choices": [{"message": message, "finish_reason": "tool_calls"}]}
    endpoint.answers = [(200, answer, {}), well("\\boxed{Ann}", chat=True)]
    (record,) = evaluate(endpoint, tmp_path)
    assert record["reward"] == 1.0
    assert endpoint.asked[1][1]["messages"][-1]["content"].startswith("error: the call has no")


def test_calls_in_the_text_of_an_endpoint_are_read_too(endpoint: Endpoint, tmp_path: Path) -> None:
    """A server without a parser of tool calls sends them as text."""
    text = turn("qwen2_5", "did")
    endpoint.answers = [well(text, chat=True), well("\\boxed{Ann}", chat=True)]
    (record,) = evaluate(endpoint, tmp_path)
    assert (record["reward"], record["metrics"]["searches"]) == (1.0, 1.0)
    assert endpoint.asked[1][1]["messages"][2:] == [
        {"role": "assistant", "content": text},
        {"role": "user", "content": '"It"\nAnn did it.'},
    ]


def test_an_endpoint_that_completes_text_gets_the_prompt_and_the_frames_as_text(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.answers = [well(turn("qwen2_5", "did")), well("\\boxed{Ann}")]
    evaluate(endpoint, tmp_path, chat=False)
    first, second = [body["prompt"] for _, body in endpoint.asked]
    assert "<tools>" in first
    assert second == first + turn("qwen2_5", "did") + (  # the end that stopped it is put back
        '<|im_end|>\n<|im_start|>user\n<tool_response>\n"It"\nAnn did it.\n</tool_response>'
        "<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_template_of_ones_own_reaches_the_endpoint(endpoint: Endpoint, tmp_path: Path) -> None:
    file = tmp_path / "chat.yaml"
    file.write_text("- {role: system, content: Be brief.}\n- {role: user, content: 'Q {question}'}")
    endpoint.answers = [well("\\boxed{Ann}", chat=True)]
    evaluate(endpoint, tmp_path, f"template={file}")
    assert endpoint.asked[0][1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q Who did it?"},
    ]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["header"]["environment"]["template"].startswith("own, sha256 ")
