"""verl: its agent loop worker plays the environment's episodes; scripts stand in for LLM servers.

Run by ``make adapters-verl``, in an environment of its own; not part of CI.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pytest
import yaml
from datasets import Dataset
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import (
    AgentLoopWorker,
    DictConfigWrap,
    _agent_loop_registry,
)
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
from verl.workers.rollout.replica import TokenOutput

from research_env.adapters import shared
from research_env.adapters.shared import share
from research_env.adapters.verl import NAME, ResearchAgentLoop, rows
from research_env.errors import ConfigurationError, UnknownTaskError
from research_env.sessions import Sessions
from research_env.testing import Played, conformance
from tests.blocks import ROOT, block_of
from tests.research_env.fakes import DATASET, answer, search, suite_sessions
from tests.research_env.fakes import Engine as Fake

STARTER = ROOT / "research_agent/starters/miniworld-starter"


class Server:
    """Stands in for verl's client of its LLM servers; says the turns of a script."""

    def __init__(self, tokenizer: Any, said: Sequence[str]) -> None:
        self.tokenizer, self.said = tokenizer, list(said)
        self.asked: list[tuple[list[int], Mapping[str, Any]]] = []

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: Mapping[str, Any], **_: Any
    ) -> TokenOutput:
        self.asked.append((list(prompt_ids), sampling_params))
        if not self.said:
            return TokenOutput(token_ids=[], log_probs=[], stop_reason="aborted")
        return turn_of(self.tokenizer, self.said.pop(0))


class Client:
    """The same for any episode: searches once, then answers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    async def generate(self, prompt_ids: list[int], **_: Any) -> TokenOutput:
        searched = "<result>" in self.tokenizer.decode(prompt_ids)
        return turn_of(self.tokenizer, answer("nobody") if searched else search("Who founded it?"))


def turn_of(tokenizer: Any, text: str) -> TokenOutput:
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return TokenOutput(token_ids=ids, log_probs=[-1.0] * len(ids), stop_reason="completed")


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text without the end tokens that `turn_of` adds."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(STARTER)


@pytest.fixture(autouse=True)
def shared_sessions_end_with_the_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made: dict[str, Sessions] = {}
    monkeypatch.setattr(shared, "_SHARED", made)
    yield
    for each in made.values():
        each.close()


@pytest.fixture
def sessions() -> Iterator[Sessions]:
    with Sessions(dataset=DATASET, retriever=Fake(), template="question") as made:
        share(made, shared="verl")
        yield made


def make_loop(server: Any, length: int = 4000, prompt_length: int = 512, **arguments: Any) -> Any:
    """The loop as verl's worker makes it, from the entry of a file."""
    rollout = {"prompt_length": prompt_length, "response_length": length}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "data": {}})
    entry = {"_target_": "research_env.adapters.verl.ResearchAgentLoop", **arguments}
    return hydra.utils.instantiate(
        entry,
        trainer_config=DictConfigWrap(config),
        server_manager=server,
        tokenizer=server.tokenizer,
        processor=None,
        dataset_cls=object,
        data_config=DictConfigWrap(config.data),
    )


async def play_one(server: Any, question_id: str, **loop: Any) -> Any:
    made = make_loop(server, **{"args": {"shared": "verl"}, **loop})
    row = {"raw_prompt": [], "extra_info": {"question_id": question_id}}
    return await made.run({"temperature": 1.0}, **row)


def test_it_conforms(tokenizer: Any) -> None:
    with suite_sessions() as (sessions, engine):
        share(sessions, shared="conformance")

        async def play(question_id: str, actions: Sequence[str]) -> Played:
            server = Server(tokenizer, actions)
            output = await play_one(server, question_id, args={"shared": "conformance"})
            assert len(output.response_ids) == len(output.response_logprobs)
            metrics = dict(output.extra_fields["reward_extra_info"])
            void = bool(metrics.pop("void"))
            assert not (void and any(output.response_mask))
            pairs = list(zip(output.response_ids, output.response_mask, strict=True))
            runs = [] if void else groupby(pairs, key=itemgetter(1))
            texts = [(mask, text_of(tokenizer, [token for token, _ in run])) for mask, run in runs]
            return Played(
                text_of(tokenizer, output.prompt_ids),
                [text for mask, text in texts if not mask],
                output.reward_score,
                metrics,
                void,
                kept=None if void else "".join(text for mask, text in texts if mask),
                masked=None if void else "".join(text for mask, text in texts if not mask),
            )

        conformance(play, engine)


def test_the_tokens_are_those_that_were_sampled(tokenizer: Any, sessions: Sessions) -> None:
    server = Server(tokenizer, [search("3"), answer("Founder 3")])
    output = asyncio.run(play_one(server, "q3"))
    assert (output.reward_score, output.num_turns) == (1.0, 4)
    (first, params), (second, _) = server.asked
    assert tokenizer.decode(first) == "Who founded company 3?\n"
    assert second == first + output.response_ids[: len(second) - len(first)]
    assert params["stop"] == ["</search>"]
    assert params["include_stop_str_in_output"] is True
    assert params["max_tokens"] == 4000
    as_dict = output.as_dict()
    assert as_dict["rm_scores"].sum().item() == 1.0


def test_a_spent_budget_is_scored(tokenizer: Any, sessions: Sessions) -> None:
    server = Server(tokenizer, [search("3"), answer("Founder 3")])
    whole = len(tokenizer(search("3"), add_special_tokens=False)["input_ids"]) + 1
    output = asyncio.run(play_one(server, "q3", length=whole + 2))
    assert (output.reward_score, len(output.response_ids)) == (0.0, whole)
    assert output.extra_fields["reward_extra_info"]["searches"] == 1.0


@pytest.mark.parametrize(("reason", "turns"), [("completed", 2), ("aborted", 1)])
def test_a_turn_that_is_shorter_than_it_may_be_has_ended_by_itself(
    tokenizer: Any, reason: str, turns: int
) -> None:
    """Whatever token ended it; search-r1 answers a turn without a tag with a hint."""
    said = [tokenizer(text)["input_ids"] for text in ("Which?", "<answer>Founder 3</answer>")]

    async def generate(**_: Any) -> TokenOutput:
        return TokenOutput(token_ids=said.pop(0), stop_reason=reason)

    server = SimpleNamespace(tokenizer=tokenizer, generate=generate)
    settings: Any = {"dataset": DATASET, "retriever": Fake(), "protocol": "search-r1"}
    with Sessions(template="question", **settings) as sessions:
        share(sessions, shared="verl")
        output = asyncio.run(play_one(server, "q3"))
    assert (output.num_turns, output.reward_score) == (2 * turns, turns - 1.0)
    assert output.response_logprobs is None


def test_a_void_episode_is_masked_and_has_the_same_keys(tokenizer: Any, sessions: Sessions) -> None:
    void = asyncio.run(play_one(Server(tokenizer, [search("fail")]), "q3"))
    right = asyncio.run(play_one(Server(tokenizer, [answer("Founder 3")]), "q3"))
    infos = [each.extra_fields["reward_extra_info"] for each in (void, right)]
    assert infos[0].keys() == infos[1].keys()
    assert (infos[0]["void"], infos[1]["void"]) == (1.0, 0.0)
    assert (sum(void.response_mask), void.reward_score) == (0, 0.0)


def test_rows_choose_the_loop_and_rows_of_others_are_refused(
    tokenizer: Any, sessions: Sessions
) -> None:
    table = rows(sessions, seed=2)
    assert [row["extra_info"]["question_id"] for row in table] == [
        row["id"] for row in sessions.tasks(seed=2)
    ]
    assert {row["agent_name"] for row in table} <= set(_agent_loop_registry)
    loop = make_loop(Server(tokenizer, []), args={"shared": "verl"})
    assert isinstance(loop, ResearchAgentLoop)
    with pytest.raises(ConfigurationError, match=r"no question_id, but \['index'\]"):
        asyncio.run(loop.run({}, extra_info={"index": 1}))
    with pytest.raises(UnknownTaskError, match="q9"):
        asyncio.run(loop.run({}, extra_info={"question_id": "q9"}))
    with pytest.raises(ConfigurationError, match=r"'q3' has \d+ tokens; raise .*, which is 3"):
        asyncio.run(play_one(Server(tokenizer, []), "q3", prompt_length=3))


def test_the_documented_files_make_the_loop(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block_of("verl", "python"), {})
    (entry,) = yaml.safe_load(block_of("verl", "yaml"))
    assert entry.pop("name") == NAME
    row = Dataset.from_parquet("train.parquet")[0]
    with Sessions(**entry["args"]) as sessions:
        first = sessions.tasks()[0]
    assert row["extra_info"] == {"question_id": first["id"], "index": 0}
    server = Server(tokenizer, [answer("nobody")])
    loop = make_loop(server, **entry)
    output = asyncio.run(loop.run({}, raw_prompt=row["prompt"], extra_info=row["extra_info"]))
    assert output.reward_score == 0.1
    assert tokenizer.decode(server.asked[0][0]) == first["prompt"]


def test_verls_own_worker_plays_a_batch_of_verls_own_data_set(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under its trainer, from the documented files to the padded batch with rewards."""
    monkeypatch.chdir(tmp_path)
    exec(block_of("verl", "python"), {})
    Path("agent.yaml").write_text(block_of("verl", "yaml"), encoding="utf-8")
    overrides = {
        "data.return_raw_chat": True,
        "actor_rollout_ref.model.path": STARTER,
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.prompt_length": 100,
        "actor_rollout_ref.rollout.response_length": 500,
        "actor_rollout_ref.rollout.agent.agent_loop_config_path": tmp_path / "agent.yaml",
    }
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer", [f"{key}={it}" for key, it in overrides.items()])
    table = RLHFDataset("train.parquet", tokenizer, config.data)
    batch = DataProto.from_single_dict(collate_fn([table[i // 2] for i in range(4)]))
    worker = AgentLoopWorker(config, llm_client=Client(tokenizer))
    output = asyncio.run(worker.generate_sequences(batch))
    assert output.batch["responses"].shape == (4, 500)
    (entry,) = yaml.safe_load(block_of("verl", "yaml"))
    with Sessions(**entry["args"]) as sessions:
        tasks = sessions.tasks()
        for i in range(4):
            session = sessions.open(tasks[i // 2]["id"])
            seen = session.step(search("Who founded it?")).observation
            last = session.step(answer("nobody"))
            prompt, ids = output.batch["prompts"][i], output.batch["responses"][i]
            mask, kept = output.batch["response_mask"][i].bool(), ids != tokenizer.pad_token_id
            assert text_of(tokenizer, prompt.tolist()) == session.prompt
            assert text_of(tokenizer, ids[mask].tolist()) == search("Who founded it?") + answer(
                "nobody"
            )
            assert text_of(tokenizer, ids[kept & ~mask].tolist()) == seen
            assert output.batch["rm_scores"][i].sum().item() == pytest.approx(last.reward)
            for name, value in last.info["metrics"].items():
                assert output.non_tensor_batch[name][i] == value
    assert set(output.meta_info["reward_extra_keys"]) == {*last.info["metrics"], "void"}
