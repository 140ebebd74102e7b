"""Tests on real vLLM servers, in one file, since they share the process that has loaded vLLM."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from research_agent.engines import make_engine
from research_agent.engines.base import Engine, SamplingParams
from research_agent.engines.servers import weight_sync, weight_transfer
from research_agent.engines.servers.engine import ServerEngine
from research_agent.engines.servers.weight_sync import model_weights
from research_agent.engines.transformers import TransformersEngine
from research_agent.environments import make_environments
from research_agent.errors import EngineError
from research_agent.rollout import collect
from research_agent.trajectory import Trajectory
from research_env.judge import JudgeError, JudgeSettings, judge_predictions
from tests.research_agent import cuda_double
from tests.research_agent.conftest import tiny_qwen2
from tests.research_agent.test_rollout import TOY, Limits
from tests.research_agent.test_server_engine import RENDERER, finish
from tests.research_agent.torchrun import in_two_processes
from tests.research_env.judge.test_judge import episode, judged, write
from tests.vllm_server import Launcher, VllmServer, need_vllm, save_model, serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    need_vllm()
    launcher = Launcher(cuda_double.as_plugin(tmp_path_factory.mktemp("plugin")))
    yield launcher
    launcher.close()


class Vllm(VllmServer):
    """A server of a model that learns."""

    def __init__(self, launcher: Launcher, folder: Path, transfer: str) -> None:
        more = "--max-model-len 256 --enable-scale-out --logprobs-mode processed_logprobs"
        config = f'{{"backend":"{transfer}"}}'
        super().__init__(launcher, folder, *more.split(), "--weight-transfer-config", config)
        self.transfer = transfer

    def version(self) -> str:
        return str(httpx.get(f"{self.url}/weight_info").json()["weight_version"])

    def checksums(self) -> Any:
        answer = httpx.post(f"{self.url}/weight_checker", json={"action": "checksum"}, timeout=60)
        return answer.json()["checksums"]

    def finished(self) -> int:
        """How many requests it has answered since its start."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(
            int(float(line.rpartition(" ")[2]))
            for line in lines
            if line.startswith("vllm:request_success_total")
        )


@pytest.fixture(scope="module")
def both(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Vllm]]:
    """Two servers with other weights than those of the tests, and doubles of CUDA."""
    folder = tmp_path_factory.mktemp("vllm") / "model"
    torch.manual_seed(9)
    model = tiny_qwen2(hidden=128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    RENDERER.tokenizer.save_pretrained(folder)
    both = [Vllm(launcher, folder, transfer) for transfer in ("nccl", "ipc")]
    yield both
    for server in both:
        server.kill()


@pytest.fixture
def servers(both: list[Vllm]) -> list[Vllm]:
    """Both servers, started again where a test has killed them."""
    for server in both:
        if not server.runs():
            server.start()
    for server in both:
        server.ready()
    return both


def changed(model: Any, seed: int) -> Any:
    """The model with other weights, in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def plays(engine: Engine, temperature: float = 0.0, **hooks: Any) -> list[Trajectory]:
    """24 trajectories of three turns each; many of the turns end inside the token ``>.``."""
    environments = make_environments(TOY, 8, {"turns": 3, "end": ">"})
    episodes = [(episode, sample) for episode in range(4) for sample in range(6)]
    limits = Limits(temperature=temperature, max_turn_tokens=24, max_prompt=100, max_response=200)
    return collect(engine, environments, RENDERER, episodes, limits, **hooks)


def tokens(trajectories: list[Trajectory]) -> list[list[int]]:
    return [trajectory.tokens for trajectory in trajectories]


def versions(trajectories: list[Trajectory]) -> set[int]:
    """The versions of the weights that any token was sampled with."""
    return {v for t in trajectories for s in t.segments if s.logprobs for v in s.versions or ()}


def worst_logprob(model: Any, trajectories: list[Trajectory], temperature: float) -> float:
    """The largest distance of a sampler's log-probability to a learner's."""
    worst, count = 0.0, 0
    for trajectory in trajectories:
        with torch.no_grad():
            logits = model(torch.tensor([trajectory.tokens])).logits[0].double()
        full = torch.log_softmax(logits / temperature, -1)
        at = 0
        for segment in trajectory.segments:
            for i, token in enumerate(segment.tokens):
                if segment.logprobs is not None:
                    worst = max(worst, abs(full[at - 1, token].item() - segment.logprobs[i]))
                    count += 1
                at += 1
    assert count > 500
    return worst


def test_real_servers_take_weights_from_memory(
    servers: list[Vllm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By vLLM's own transfers, on both sides; only CUDA and NCCL themselves are doubles."""
    cuda_double.install(monkeypatch.setattr)
    monkeypatch.setattr(weight_sync, "require_gpu", lambda *_: None)
    # The weights, 1.5 MB, take several buckets.
    monkeypatch.setattr(weight_transfer, "BUCKET", 2**18)
    model = changed(tiny_qwen2(hidden=128), 20)
    local = TransformersEngine(model, RENDERER, 8, 256)
    engines: list[Engine] = []
    for server in servers:
        name = f"server+{server.transfer}:{server.url}"
        engines.append(make_engine(name, model, RENDERER, max_slots=8))
    for version in range(4):
        if version:
            changed(model, version)
            local.load_weights(model.named_parameters(), version)
        expected = tokens(plays(local))
        for server, engine in zip(servers, engines, strict=True):
            before = server.version()
            if version:
                if version == 2:  # after a transfer that breaks off, too
                    cuda_double.break_off(after=3)
                engine.load_weights(model_weights(model), version)
                assert server.version() != before
            greedy = plays(engine)
            assert tokens(greedy) == expected
            assert versions(greedy) == {version}
            assert worst_logprob(model, greedy, 1.0) < 1e-4
    for server, engine in zip(servers, engines, strict=True):
        assert isinstance(engine, ServerEngine)
        engine.close()
        httpx.post(f"{server.url}/update_weight_version", json={"new_version": "default"})


def test_real_servers(  # noqa: PLR0915
    servers: list[Vllm], caplog: pytest.LogCaptureFixture
) -> None:
    """One test of many parts, as each needs both servers, which take a minute to start."""
    caplog.set_level(logging.WARNING)
    model = tiny_qwen2(hidden=128)
    local = TransformersEngine(model, RENDERER, 8, 256)
    urls = ",".join(server.url for server in servers)
    engine = make_engine(f"server:{urls}", model, RENDERER, max_slots=8)

    # The servers have the model's weights, whatever they were started with.
    before = [server.finished() for server in servers]
    assert servers[0].version() == servers[1].version() != "default"
    greedy = plays(engine)
    assert tokens(greedy) == tokens(plays(local))
    ends = {segment.text[-1:] for t in greedy for segment in t.segments if segment.logprobs}
    assert ">" in ends or "." in ends
    finished = [
        server.finished() - already for server, already in zip(servers, before, strict=True)
    ]
    assert min(finished) > 10

    # Log-probabilities are the learner's at the sampling temperature, and seeds decide.
    for temperature in (1.0, 0.6):
        sampled = plays(engine, temperature)
        assert worst_logprob(model, sampled, temperature) < 1e-4
    assert tokens(plays(engine, temperature)) == tokens(sampled)
    assert tokens(plays(engine, temperature, seed=1)) != tokens(sampled)

    # New weights reach both.
    for version in (1, 2):
        changed(model, version)
        engine.load_weights(model.named_parameters(), version)
        local.load_weights(model.named_parameters(), version)
        assert servers[0].version() == servers[1].version()
        greedy = plays(engine)
        assert tokens(greedy) == tokens(plays(local))
        assert versions(greedy) == {version}
    assert worst_logprob(model, plays(engine, 1.0), 1.0) < 1e-4

    # Two ranks with sharded weights give them once, and sample what one process samples.
    assert isinstance(engine, ServerEngine)
    engine.close()  # a server is for one run: this one would give its own weights again
    arguments = [urls.split(","), "serve", "float32"]
    said = in_two_processes("tests.research_agent.server_worker", json.dumps({"real": arguments}))
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert servers[0].version() == servers[1].version()
    sums = [server.checksums() for server in servers]
    assert sums[0] == sums[1]
    plain = tiny_qwen2(hidden=128)
    engine = make_engine(f"server:{urls}", model, RENDERER, max_slots=8)
    engine.load_weights([(name, p.detach() * 2) for name, p in plain.named_parameters()], 2)
    assert [server.checksums() for server in servers] == sums
    for line in sorted(lines, key=lambda line: line["rank"]):
        for slot in range(4):
            seed = 4 * line["rank"] + slot
            params = SamplingParams(max_tokens=3, seed=seed)
            engine.submit(slot, RENDERER.encode_text(f"q{seed}"), params)
        alone = [[slot, list(turn.tokens), 2] for slot, turn in finish(engine).items()]
        assert sorted(alone) == [turn for turn in line["turns"] if turn[2] == 2]
        for slot in range(4):
            engine.release(slot)
    engine.load_weights(model.named_parameters(), 2)

    # One is killed in the middle.
    over: list[Trajectory] = []

    def kill_one(trajectory: Trajectory) -> None:
        over.append(trajectory)
        if len(over) == 6:
            servers[0].kill()

    greedy = plays(engine, on_finish=kill_one)
    assert tokens(greedy) == tokens(plays(local))
    assert not any(trajectory.void for trajectory in greedy)
    assert f"{servers[0].url} is left out" in caplog.text

    # It is started again while the weights change, and is used with the new ones only.
    changed(model, 3)
    engine.load_weights(model.named_parameters(), 3)
    local.load_weights(model.named_parameters(), 3)
    caplog.clear()  # on a busy machine it may have been away, and back, before
    servers[0].start()
    servers[0].ready()
    assert servers[0].finished() == 0
    engine.load_weights(model.named_parameters(), 3)
    assert f"{servers[0].url} is back" in caplog.text
    assert servers[0].version() == servers[1].version()
    greedy = plays(engine)
    assert tokens(greedy) == tokens(plays(local))
    assert servers[0].finished() > 10

    # All are killed.
    assert isinstance(engine, ServerEngine)
    engine.close()
    for server in servers:
        server.kill()
    with pytest.raises(EngineError, match="no vLLM server can be used"):
        make_engine(f"server:{urls}", model, RENDERER, max_slots=8)


@pytest.fixture(scope="module")
def judge_url(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a model that gives verdicts."""
    folder = tmp_path_factory.mktemp("vllm") / "model"
    save_model(folder)
    more = ("--max-model-len", "4096", "--max-num-seqs", "8")
    with serving(folder, *more, launcher=launcher) as url:
        yield url


def test_a_real_server_holds_the_model_to_a_verdict(tmp_path: Path, judge_url: str) -> None:
    """vLLM takes the JSON schema; its model writes the first token that the schema allows."""
    path = write(tmp_path, *(episode(n) for n in range(24)))
    summary = judge_predictions(path, JudgeSettings(judge_url, "model"))
    assert (summary.n, summary.missing, summary.score) == (24, 0, 1.0)
    raw = {each["raw"] for each in judged(tmp_path)}
    assert {json.dumps(json.loads(each)) for each in raw} == {
        '{"rationale": "", "judgement": "correct"}'
    }
    assert summary.replies == 24
    assert summary.replies_without_usage == 0
    assert summary.tokens_in > 24 * 1_000  # a byte a token, and the prompt has 1,400 of them
    assert summary.tokens_out == 24 * (len(raw.pop()) + 1)
    assert "all 24 predictions correct" in summary.warnings[0]


def test_a_real_server_whose_model_gives_no_verdict(tmp_path: Path, judge_url: str) -> None:
    """Without a form the same model writes nothing."""
    path = write(tmp_path, *(episode(n) for n in range(3)))
    settings = JudgeSettings(judge_url, "model", "r1-searcher")
    summary = judge_predictions(path, settings)
    assert (summary.missing, summary.range) == (3, (0.0, 1.0))
    assert summary.reasons == {"no valid verdict": 3}
    assert summary.replies == 6


def test_a_real_server_refuses_what_is_too_long_or_unknown(tmp_path: Path, judge_url: str) -> None:
    path = write(tmp_path, episode(1, "word " * 2_000), episode(2))
    summary = judge_predictions(path, JudgeSettings(judge_url, "model"))
    assert (summary.correct, summary.reasons) == (1, {"status 400": 1})
    (line,) = [each for each in judged(tmp_path) if each["correct"] is None]
    assert "4096" in line["problem"]
    with pytest.raises(JudgeError, match="404"):
        judge_predictions(path, JudgeSettings(judge_url, "other"), tmp_path / "other")
