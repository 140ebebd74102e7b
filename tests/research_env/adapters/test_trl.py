"""TRL: GRPOTrainer itself trains over sessions, by rollout_func and by environment_factory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from research_agent.models.source import resolve_model
from research_env import Dataset, Question, testing
from research_env.adapters.tokens import encode_observation, encode_text
from research_env.adapters.trl_sampling import _cut
from research_env.errors import ConfigurationError, EpisodeError, UnknownTaskError
from research_env.sessions import Sessions
from research_env.testing import Played, conformance
from research_env.tools import write_call
from tests.research_agent.conftest import byte_tokenizer
from tests.research_env.fakes import DATASET, answer, search, suite_sessions
from tests.research_env.fakes import Engine as Fake

trl: Any = pytest.importorskip("trl")
adapter = import_module("research_env.adapters.trl")
transformers: Any = import_module("transformers")
datasets: Any = import_module("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")

STARTER = str(resolve_model("miniworld-starter"))
TOKENS = ("<|im_start|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(STARTER)


@pytest.fixture
def world() -> Iterator[Sessions]:
    with Sessions(dataset="miniworld", template="question", top_k=1) as made:
        yield made


@pytest.fixture
def tiny() -> Iterator[Sessions]:
    with Sessions(dataset=DATASET, retriever=Fake(), template="question") as made:
        yield made


def config(folder: Path, **more: Any) -> Any:
    plain: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "shuffle_dataset": False,
        "seed": 1,
    }
    return trl.GRPOConfig(**{**plain, **more})


class Recorded:
    """Passes calls on, and remembers what came back."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.results: list[Any] = []

    def __call__(self, *arguments: Any) -> Any:
        self.results.append(self.function(*arguments))
        return copy.deepcopy(self.results[-1])


def fake_trainer(tokenizer: Any, **more: Any) -> Any:
    """What the adapter reads of a trainer, for episodes whose turns are given."""
    plain = {
        "_tokenizer": tokenizer,
        "eos_token_ids": [tokenizer.eos_token_id],
        "max_completion_length": 100_000,
        "mask_truncated_completions": False,
        "use_vllm": False,
        "chat_template": None,
        "chat_template_kwargs": {},
    }
    return SimpleNamespace(**{**plain, **more})


def says(tokenizer: Any, texts: Sequence[str]) -> Callable[..., Any]:
    """A policy that writes these turns; afterwards nothing, as one whose budget is spent."""
    left = list(texts)

    def generate(trainer: Any, sequences: Any, rooms: Any, stops: tuple[str, ...]) -> Any:
        text = left.pop(0) if left else ""
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        if text and not any(stop in text for stop in stops):
            ids = [*ids, tokenizer.eos_token_id]
        return [list(ids) for _ in sequences], [[-0.5] * len(ids) for _ in sequences]

    return generate


def parts(tokenizer: Any, ids: Sequence[int], mask: Sequence[int]) -> list[tuple[int, str]]:
    """Runs of tokens with the same mask, as text without the end token."""
    runs: list[tuple[int, list[int]]] = []
    for token, kind in zip(ids, mask, strict=True):
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        if token != tokenizer.eos_token_id:
            runs[-1][1].append(token)
    return [(kind, tokenizer.decode(tokens)) for kind, tokens in runs]


def test_rollouts_conform_in_threads() -> None:
    # One for each episode, as a tokenizer changes with each call.
    tokenizers = [byte_tokenizer() for _ in range(len(testing.SCRIPTS) + testing.CONCURRENT)]
    with suite_sessions() as (sessions, engine):
        prompts = {row["id"]: row["prompt"] for row in sessions.tasks()}

        def play(question_id: str, actions: Sequence[str]) -> Played:
            tokenizer = tokenizers.pop()
            rollouts = adapter.Rollouts(sessions, generate=says(tokenizer, actions))
            out = rollouts([prompts[question_id]], fake_trainer(tokenizer))
            assert len(out["logprobs"][0]) == len(out["env_mask"][0])
            masked_logprobs = zip(out["env_mask"][0], out["logprobs"][0], strict=True)
            assert {(0, 0.0), (1, -0.5)} >= set(masked_logprobs)
            runs = parts(tokenizer, out["completion_ids"][0], out["env_mask"][0])
            return Played(
                tokenizer.decode(out["prompt_ids"][0]),
                [text for kind, text in runs if not kind],
                rollouts.reward(out["env_reward"], out["env_metrics"], out["env_void"])[0],
                out["env_metrics"][0],
                out["env_void"][0],
                kept="".join(text for kind, text in runs if kind),
                masked="".join(text for kind, text in runs if not kind),
            )

        conformance(play, engine)


def tool_calls(action: str) -> list[dict[str, Any]]:
    query = action.partition("<search>")[2].partition("</search>")[0]
    return [{"type": "function", "function": {"name": "search", "arguments": {"query": query}}}]


def test_tools_conform() -> None:
    """TRL's loop ends at the first message without a call."""
    with suite_sessions() as (sessions, _):
        tools = adapter.Tools(sessions)
        prompts = {row["question_id"]: row["prompt"] for row in tools.rows()}

        def play(question_id: str, actions: Sequence[str]) -> Played:
            environment = tools()
            environment.reset(prompt=prompts[question_id], question_id=question_id)
            texts, messages = [], []
            for action in actions:
                if "<search>" in action:
                    (call,) = calls = tool_calls(action)
                    content = action.partition("<search>")[0]
                    messages.append({"role": "assistant", "content": content, "tool_calls": calls})
                    texts.append(environment.search(**call["function"]["arguments"]))
                    messages.append({"role": "tool", "content": texts[-1]})
                else:
                    messages.append({"role": "assistant", "content": action})
            metrics: dict[str, float] = {}
            (reward,) = tools.reward([environment], [messages], metrics.__setitem__)
            metrics = {name.removeprefix("env/"): value for name, value in metrics.items()}
            void = bool(metrics.pop("void"))
            return Played(prompts[question_id][0]["content"], texts, reward, metrics, void)

        conformance(play, ends_without_search=True)


def test_two_grpo_steps_by_rollouts(tmp_path: Path, world: Sessions, tokenizer: Any) -> None:
    rollouts = adapter.Rollouts(world, seed=7)
    recorded = Recorded(rollouts)
    model = transformers.AutoModelForCausalLM.from_pretrained(STARTER)
    outputs: list[Any] = []

    class Trainer(trl.GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            outputs.append(super()._generate_and_score_completions(inputs))
            return outputs[-1]

    trainer = Trainer(
        model=model,
        args=config(tmp_path, per_device_train_batch_size=8, max_completion_length=300),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rollouts.rows()[:8]),
        rollout_func=recorded,
        reward_funcs=rollouts.reward,
    )
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    assert any(not before[name].equal(value) for name, value in model.state_dict().items())
    ids = [row["question_id"] for row in rollouts.rows()]
    checked = searched = 0
    for step, (out, batch) in enumerate(zip(recorded.results, outputs, strict=True)):
        in_loss = (batch["tool_mask"] * batch["completion_mask"]).tolist()
        assert out["logprobs"] is None
        for i in range(8):
            session = world.open(ids[2 * step + i // 4])
            assert tokenizer.decode(out["prompt_ids"][i]) == session.prompt
            assert len(out["completion_ids"][i]) <= 300
            mask = out["env_mask"][i]
            assert in_loss[i] == mask + [0] * (len(in_loss[i]) - len(mask))
            runs = parts(tokenizer, out["completion_ids"][i], mask)
            last = None
            for kind, text in runs:
                if kind:
                    last = session.step(text)
                else:
                    assert last is not None
                    assert text == last.observation
                    searched += 1
            if not session.episode.over:
                last = session.truncate("length")
            assert last is not None
            assert (out["env_reward"][i], out["env_metrics"][i]) == (
                last.reward,
                last.info["metrics"],
            )
            checked += 1
    assert checked == 16
    assert searched > 0
    assert logs[0]["env/searches"] == pytest.approx(
        sum(each["searches"] for each in recorded.results[0]["env_metrics"]) / 8
    )


def scripted(trainer_class: Any, script: Callable[[int, int], str]) -> Any:
    """A trainer whose policy writes what the script says for a rollout and a turn."""

    class Scripted(trainer_class):  # type: ignore[misc]
        turn = 0
        outputs: list[Any]

        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            texts = [script(i, self.turn) for i in range(len(prompt_ids))]
            self.turn += 1
            encode = self.processing_class
            return [encode(text, add_special_tokens=False)["input_ids"] for text in texts], None

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            self.turn = 0
            output = super()._generate_and_score_completions(inputs)
            self.outputs = [*getattr(self, "outputs", []), output]
            return output

    return Scripted


def chat_starter() -> tuple[Any, Any]:
    """The starter with the chat template and the marks of Qwen3."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(STARTER)
    model = transformers.AutoModelForCausalLM.from_pretrained(STARTER)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.add_tokens(list(TOKENS), special_tokens=False)
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.max_position_embeddings = 4096
    return tokenizer, model


def test_two_grpo_steps_by_tools(tmp_path: Path, tiny: Sessions) -> None:
    """TRL's own loop parses the calls, runs them, frames and masks the results."""
    tokenizer, model = chat_starter()
    tools = adapter.Tools(tiny, seed=7)
    row = next(row for row in tools.rows() if row["question_id"] == "q1")
    thought = "<think>\nI look it up.\n</think>\n\n"
    queries = ["1 2", "fail", "3", "1"]

    def script(rollout: int, turn: int) -> str:
        if turn == 0:
            name = "seek" if rollout == 2 else "search"
            call = f'{{"name": "{name}", "arguments": {{"query": "{queries[rollout]}"}}}}'
            return f"{thought}<tool_call>\n{call}\n</tool_call><|im_end|>"
        founder = "Founder 1" if rollout == 0 else "nobody"
        return f"{thought}<answer>\\boxed{{{founder}}}</answer><|im_end|>"

    trainer = scripted(trl.GRPOTrainer, script)(
        model=model,
        args=config(tmp_path, max_completion_length=2000),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([row] * 4),
        environment_factory=tools,
        reward_funcs=tools.reward,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == len(trainer.outputs) == 2
    for log, output in zip(logs, trainer.outputs, strict=True):
        # Rollout 1 is void and left out; 2 called a tool that is not there, and went on.
        assert log["env/void"] == 0.25
        assert log["env/em"] == pytest.approx(1 / 3)
        assert log["env/searches"] == pytest.approx(2 / 3)
        assert log["reward"] == pytest.approx((1.0 + 0.1 + 0.1) / 3)
        assert float(output["advantages"][1]) == 0.0
        kept = output["completion_mask"].bool()
        for i, word in ((0, "About 1 2 number 2."), (2, "Tool seek not found"), (3, "About 1 ")):
            ids = output["completion_ids"][i][kept[i]].tolist()
            mask = output["tool_mask"][i][kept[i]].tolist()
            masked = tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if not m])
            policy = tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m])
            assert word in masked
            assert policy == script(i, 0) + script(i, 1)


def test_the_budget_of_tokens_cuts_and_scores_an_episode(tiny: Sessions) -> None:
    tokenizer = byte_tokenizer()
    turns = [search("1"), answer("Founder 1")]
    row = next(r for r in adapter.Rollouts(tiny).rows() if r["question_id"] == "q1")
    for budget, ends in ((60, "length"), (len(search("1")) + 20, "length"), (5000, "answer")):
        rollouts = adapter.Rollouts(tiny, generate=says(tokenizer, turns))
        out = rollouts([row["prompt"]], fake_trainer(tokenizer, max_completion_length=budget))
        assert out["env_metrics"][0]["searches"] == 1.0
        assert out["env_reward"][0] == (1.0 if ends == "answer" else 0.0)
        assert len(out["completion_ids"][0]) <= budget
        assert 0 in out["env_mask"][0] or ends == "length"


@pytest.mark.parametrize(("left", "reward"), [(len(" and more"), 1.0), (0, 1.0), (-1, 0.0)])
def test_a_turn_that_the_budget_cuts_is_scored(tiny: Sessions, left: int, reward: float) -> None:
    """As in the environment, which reads an answer with whatever follows it."""
    tokenizer = byte_tokenizer()
    right = answer("Founder 1")
    rollouts = adapter.Rollouts(tiny, generate=says(tokenizer, [right + " and more of it."]))
    prompt = next(row["prompt"] for row in rollouts.rows() if row["question_id"] == "q1")
    budget = len(right) + left
    out = rollouts([prompt], fake_trainer(tokenizer, max_completion_length=budget))
    assert (out["env_reward"], out["env_metrics"][0]["em"]) == ([reward], reward)
    assert out["env_mask"] == [[1] * budget]


def test_the_rewards_of_all_turns_count() -> None:
    """By hand: the first search finds the gold passage, 0.25; the second nothing; the answer 1."""
    settings: dict[str, Any] = {"template": "question", "turn_reward": "0.25*new_support"}
    tokenizer = byte_tokenizer()
    with Sessions(dataset=DATASET, retriever=Fake(), **settings) as sessions:
        turns = [search("1"), search("2"), answer("Founder 1")]
        rollouts = adapter.Rollouts(sessions, generate=says(tokenizer, turns))
        prompt = next(row["prompt"] for row in rollouts.rows() if row["question_id"] == "q1")
        assert rollouts([prompt], fake_trainer(tokenizer))["env_reward"] == [1.25]
        environment = adapter.Tools(sessions)()
        environment.reset("q1")
        environment.search("1")
        environment.search("2")
        said = [{"role": "assistant", "content": answer("Founder 1")}]
        assert adapter.Tools.reward([environment], [said]) == [1.25]


def test_special_tokens_are_part_of_what_the_policy_wrote() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|im_end|>"]}
    )
    call = write_call("search", {"query": "1"}) + "<|im_end|>"
    scripts: list[tuple[str, list[str], dict[str, float]]] = [
        ("research", [answer("Founder <|im_end|>1")], {"em": 0.0, "f1": 0.5}),
        ("tool-calls", [call, r"\boxed{Founder 1}"], {"em": 1.0, "searches": 1.0}),
    ]
    for protocol, turns, metrics in scripts:
        with Sessions(dataset=DATASET, retriever=Fake(), protocol=protocol) as sessions:
            rollouts = adapter.Rollouts(sessions, generate=says(tokenizer, turns))
            prompt = next(row["prompt"] for row in rollouts.rows() if row["question_id"] == "q1")
            out = rollouts([prompt], fake_trainer(tokenizer))
        assert metrics.items() <= out["env_metrics"][0].items()


def test_chat_prompts_are_rendered_by_the_chat_template(tiny: Sessions) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"
    rollouts = adapter.Rollouts(tiny, chat=True, generate=says(tokenizer, [answer("x")]))
    row = rollouts.rows()[0]
    assert row["prompt"] == tiny.open(0).info["messages"]
    out = rollouts([row["prompt"]], fake_trainer(tokenizer))
    assert tokenizer.decode(out["prompt_ids"][0]) == f"[user]{row['prompt'][0]['content']}>"


def test_tool_calls_are_framed_by_the_chat_template() -> None:
    tokenizer = byte_tokenizer()
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    calls = write_call("search", {"query": "1"})
    settings: dict[str, Any] = {"protocol": "tool-calls", "template": "instruct"}
    with Sessions(dataset=DATASET, retriever=testing.Engine(), **settings) as sessions:
        generate = says(tokenizer, [calls, "\\boxed{x}"])
        rollouts = adapter.Rollouts(sessions, chat=True, generate=generate)
        prompt = rollouts.rows()[0]["prompt"]
        out = rollouts([prompt], fake_trainer(tokenizer))
        (message,) = sessions.open(0).step(calls).info["messages"]
        tools = sessions.tasks()[0]["tools"]
    assert out["env_metrics"][0]["searches"] == 1.0
    function = {"name": "search", "arguments": {"query": "1"}}
    chat = [
        *prompt,
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": message["content"]},
    ]
    whole = tokenizer.apply_chat_template(
        chat, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    played = out["prompt_ids"][0] + out["completion_ids"][0]
    assert played[: len(whole)] == whole


def test_what_would_be_played_differently_is_refused(tiny: Sessions) -> None:
    tokenizer = byte_tokenizer()
    rollouts = adapter.Rollouts(tiny)
    prompt = rollouts.rows()[0]["prompt"]
    with pytest.raises(ConfigurationError, match="mask_truncated_completions=True"):
        rollouts([prompt], fake_trainer(tokenizer, mask_truncated_completions=True))
    with pytest.raises(ConfigurationError, match="give Rollouts a generate= function"):
        rollouts([prompt], fake_trainer(tokenizer, use_vllm=True))
    with pytest.raises(UnknownTaskError, match="no task has the prompt 'Who"):
        rollouts(["Who?"], fake_trainer(tokenizer))
    environment = adapter.Tools(tiny)()
    with pytest.raises(EpisodeError, match="call reset before search"):
        environment.search("x")
    with pytest.raises(UnknownTaskError, match="q9"):
        environment.reset(question_id="q9")
    environment.reset(question_id="q1")
    with pytest.raises(TypeError, match="query is text, not int"):
        environment.search(3)


def test_a_bug_that_trl_shows_to_the_policy_is_raised_with_the_reward() -> None:
    class Broken(Fake):
        def search(self, queries: Sequence[str], top_k: int) -> Any:
            raise KeyError("_source")

    with Sessions(dataset=DATASET, retriever=Broken(), template="question") as sessions:
        tools = adapter.Tools(sessions)
        environment = tools()
        environment.reset(question_id="q1")
        with pytest.raises(KeyError):  # the loop of TRL makes it a message
            environment.search("1")
        said = [{"role": "assistant", "content": answer("Founder 1")}]
        with pytest.raises(KeyError, match="_source"):
            tools.reward([environment], [said])
        environment.reset(question_id="q1")
        assert tools.reward([environment], [said]) == [1.0]


@pytest.mark.parametrize("row", [[5, 6, 9, 9], [5, 6, 7, 9], [5, 6, 7, 8]])
def test_a_turn_is_cut_after_the_token_that_completes_a_terminator(row: list[int]) -> None:
    words = {5: "<a>", 6: "b</", 7: "a> c", 8: "d"}

    def decode(ids: Sequence[int], **_: Any) -> str:
        return "".join(words[token] for token in ids if token != 9)

    cut = _cut(row, [9], SimpleNamespace(decode=decode), ("</a>", "</b>"))
    assert cut == row[:3]


def test_a_tool_loop_that_stops_at_a_call_is_a_cut_episode(tiny: Sessions) -> None:
    """TRL drops a result that has no room; the call is then the last message."""
    environment = adapter.Tools(tiny)()
    environment.reset(question_id="q1")
    environment.search("1")
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": "1"}}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    metrics: dict[str, float] = {}
    assert adapter.Tools.reward([environment], [messages], metrics.__setitem__) == [0.0]
    assert (metrics["env/searches"], metrics["env/support_recall"]) == (1.0, 1.0)
    assert environment._session.episode.stop_reason == "length"


@pytest.mark.parametrize("protocol", ["research", "search-r1", "r1-searcher"])
@pytest.mark.parametrize("query", [answer("Founder 1") + " 3", "3 </search><|end_of_query|>"])
def test_a_query_is_only_a_query(protocol: str, query: str) -> None:
    settings: dict[str, Any] = {"protocol": protocol, "template": "question"}
    with Sessions(dataset=DATASET, retriever=Fake(), **settings) as sessions:
        environment = adapter.Tools(sessions)()
        environment.reset(question_id="q1")
        assert "number 3." in environment.search(query)
        (call,) = tool_calls(f"<search>{query}</search>")
        messages = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "assistant", "content": "<answer>It is \\boxed{nobody}</answer>"},
        ]
        metrics: dict[str, float] = {}
        adapter.Tools.reward([environment], [messages], metrics.__setitem__)
    assert (metrics["env/searches"], metrics["env/cem"]) == (1.0, 0.0)
    assert "nobody" in (environment._session.episode.prediction or "")


def test_calls_that_do_not_reach_the_search_take_no_turn(tiny: Sessions) -> None:
    environment = adapter.Tools(tiny)()
    environment.reset(question_id="q1")
    environment.search("1")
    calls = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in (("open", {"query": "1"}), ("search", "{"), ("search", {"q": "1"}))
    ]
    right = {"type": "function", "function": {"name": "search", "arguments": {"query": "1"}}}
    messages = [
        {"role": "assistant", "content": "Lost. ", "tool_calls": calls},
        {"role": "assistant", "reasoning_content": "Again.", "content": "", "tool_calls": [right]},
        {"role": "assistant", "content": answer("Founder 1")},
    ]
    assert adapter.Tools.reward([environment], [messages]) == [1.0]
    assert environment._session.episode.actions == (
        "<think>Again.</think><search>1</search>",
        answer("Founder 1"),
    )


def test_tasks_with_equal_prompts_are_one_row() -> None:
    twins = Dataset("twins", [Question(f"t{i}", "Who?", (str(i),)) for i in range(3)], None)
    with Sessions(dataset=twins, retriever=Fake(), template="question") as sessions:
        (row,) = adapter.Rollouts(sessions, seed=2).rows()
        assert row == {"prompt": "Who?\n", "question_id": sessions.tasks(seed=2)[0]["id"]}


def test_no_observation_holds_a_special_token(tokenizer: Any) -> None:
    for each in (tokenizer, byte_tokenizer()):
        text = f"a{each.eos_token}b {each.pad_token}\n{each.eos_token}"
        ids = encode_text(each, text)
        assert not {each.eos_token_id, each.pad_token_id} & set(ids)
        assert each.decode(ids) == text


def test_chat_markup_is_the_tokenizers_own_or_refused() -> None:
    tokenizer = byte_tokenizer()
    text, markup = "\n<|im_start|>user\nx<|im_end|>", ("<|im_start|>", "<|im_end|>", "[X]")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    inside = encode_text(tokenizer, "user\nx")
    expected = [*encode_text(tokenizer, "\n"), start, *inside, end]
    assert encode_observation(tokenizer, text, markup) == expected
    assert encode_observation(tokenizer, text, ()) == encode_text(tokenizer, text)
    for unknown in (None, tokenizer.eos_token):
        tokenizer.unk_token = unknown
        with pytest.raises(ConfigurationError, match=r"with '<\|x\|>', which is no token of this"):
            encode_observation(tokenizer, "<|im_start|>a<|x|>", ("<|im_start|>", "<|x|>"))
