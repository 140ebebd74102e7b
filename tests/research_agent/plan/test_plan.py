"""What a run would need, on GPUs that nobody has to have."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from research_agent.cli import main
from research_agent.config import TrainConfig
from research_agent.errors import ConfigError, ModelError
from research_agent.models.policy import MAX_LOGITS_GPU
from research_agent.models.source import STARTERS
from research_agent.plan import assumptions, plan
from research_agent.plan.machines import Machines, parse_machines
from research_agent.plan.memory import needs_critic
from research_agent.plan.shapes import SHAPES, read_shape
from research_agent.plan.suggestions import apply
from research_agent.presets import PRESETS
from tests.forks import FORKS

SMALL = ("miniworld", "smollm2-wiki")
PAPERS = [name for name in PRESETS if name not in SMALL and not name.endswith("-mini")]
MACHINES = [f"{nodes}8x{gpu}" for gpu in ("A100-80", "H100", "H200") for nodes in ("", "2x")]
B7, B32 = SHAPES["Qwen/Qwen2.5-7B"], SHAPES["Qwen/Qwen2.5-32B"]


def changed(name: str, **settings: Any) -> TrainConfig:
    """A preset with other settings, such as ``engine="vllm"``, in whatever section they are."""
    config = PRESETS[name]
    for setting, value in settings.items():
        sections = ("sampling", "rollout", "learner", "policy", "run")
        (section,) = (s for s in sections if hasattr(getattr(config, s), setting))
        config = apply(config, {f"{section}.{setting}": value})
    return config


# ---------------------------------------------------------------------------------------------
# Models and machines


def test_sizes_are_those_that_the_authors_publish() -> None:
    published = {"Qwen/Qwen2.5-3B": 3.09, "Qwen/Qwen2.5-7B": 7.62, "Qwen/Qwen2.5-32B": 32.76}
    published["meta-llama/Llama-3.1-8B"] = 8.03
    published |= {"Qwen/Qwen2.5-0.5B": 0.494, "Qwen/Qwen2.5-1.5B": 1.544}
    for name, shape in SHAPES.items():
        assert shape.parameters / 1e9 == pytest.approx(published[name], rel=0.002)
    assert published.keys() == SHAPES.keys()
    assert B7.kv_numbers == 2 * 28 * 4 * 128
    assert assumptions.HEAD_LOGITS == MAX_LOGITS_GPU


def test_sizes_come_from_a_folder(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    small: Any = Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
        tie_word_embeddings=True,
    )
    small.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    assert shape.parameters == sum(p.numel() for p in Qwen2ForCausalLM(small).parameters())

    small = Qwen3Config(**small.to_dict() | {"head_dim": 32, "model_type": "qwen3"})
    small.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    norms = 3 * 2 * 32  # the norms of queries and keys are not counted
    assert shape.parameters == sum(p.numel() for p in Qwen3ForCausalLM(small).parameters()) - norms

    for broken, message in (
        ({}, "num_hidden_layers"),
        (small.to_dict() | {"num_experts": 8}, "a mixture of experts"),
        (small.to_dict() | {"hidden_size": "64"}, "Expected `int`, got `str`"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(ConfigError, match=message):
            read_shape(str(tmp_path))
    with pytest.raises(ConfigError, match=r"'nobody/knows' are not known.*Qwen2.5-7B"):
        read_shape("nobody/knows")


def test_sizes_come_from_what_a_run_takes_as_its_model(tmp_path: Path) -> None:
    """The demo's starter, and the folder of a run, whose own config.json is no model's."""
    newest = tmp_path / "checkpoints" / "step-000002"
    newest.mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    starter = plan(PRESETS["miniworld"], "8xH100")
    shutil.copy(STARTERS / "miniworld-starter" / "config.json", newest)
    found = plan(changed("miniworld", model=str(tmp_path)), "8xH100")
    assert found.memory == starter.memory
    with pytest.raises(ModelError, match=r"no model folder \./nowhere"):
        read_shape("./nowhere")


def test_machines_are_read() -> None:
    assert parse_machines("8xH100") == Machines(1, 8, "H100")
    assert parse_machines("2x4xA100-80") == Machines(2, 4, "A100-80")
    assert [str(parse_machines(text)) for text in MACHINES] == MACHINES


@pytest.mark.parametrize("gpus", ["H100", "0xH100", "8xB9000", "8 x H100", "", "0x8xH100"])
def test_machines_that_cannot_be_read_are_refused(gpus: str) -> None:
    with pytest.raises(ConfigError, match=r"8xH100.*known: H200, H100"):
        parse_machines(gpus)
    with pytest.raises(ConfigError, match=r"at most 8 GPUs.*2x8xH100"):
        parse_machines("16xH100")


# ---------------------------------------------------------------------------------------------
# Memory


def test_what_is_kept_by_hand() -> None:
    found = plan(changed("research-7b", engine="vllm"), "8xH200")
    gpu, weights = found.memory.gpu, B7.parameters
    assert gpu["learner: weights"] == pytest.approx(4 * weights / 8)
    assert gpu["learner: gradients"] == gpu["learner: weights"]
    assert gpu["learner: moments"] == 2 * gpu["learner: weights"]
    assert gpu["reference policy"] == gpu["learner: weights"] / 2  # bfloat16
    # Two layers, the head and the last norm are whole at a time, and the head's gradient
    layer = (2 * 3584 + 2 * 512 + 3 * 18944) * 3584 + 3 * 3584 + 2 * 512
    table = 152064 * 3584
    assert gpu["learner: weights of a pass"] == 2 * (2 * layer + table + 3584) + 2 * table
    kept, inside = 28 * 2 * 3584, 22 * 3584 + 8 * 18944 + 4 * 512
    assert gpu["activations"] == 17408 * (kept + inside)
    assert gpu["logits of a piece"] == 20 * 2**28
    assert gpu["sampler: weights"] == 2 * weights
    share = 0.4 * 150e9
    assert sum(size for name, size in gpu.items() if name.startswith("sampler")) == share
    assert found.tokens == 256 * 5 * 1300
    assert found.fits and found.suggestions == ()
    assert found.environment["passages"] == "21,015,324 (wiki18)"

    peaks = found.memory.peaks
    assert peaks["learning"] == sum(gpu.values()) == found.memory.most
    held = gpu["learner: weights"] * 3.5 + share + 4e9
    assert peaks["saving"] == peaks["resuming"] == pytest.approx(held + 4 * table)  # not cut
    assert peaks["end of a backward pass"] == pytest.approx(
        held + gpu["learner: gradients"] + (2 + 4) * (2 * table + 3584)
    )
    # Before there is a learner, each rank loads the whole model for vLLM.
    assert peaks["starting the sampler"] == pytest.approx(share + 4e9 + 2 * weights)
    assert found.memory.host["models that ranks load whole"] == 8 * 2 * weights
    disk = {"2 checkpoints": 2 * 12 * weights, "one being written": 12 * weights}
    assert found.memory.disk == disk
    assert found.memory.host["episodes of a step"] == 8 * found.tokens * 55


def test_precision_is_that_of_the_code() -> None:
    exact = plan(changed("research-7b", engine="vllm", precision="float32"), "8xH200").memory.gpu
    assert exact["sampler: weights"] == 4 * B7.parameters
    assert exact["reference policy"] == exact["learner: weights"]
    own = plan(changed("research-7b", engine="transformers"), "8xH200").memory.gpu
    assert own["sampler: weights"] == 2 * B7.parameters
    alone = plan(changed("research-7b", engine="vllm"), "1xH200").memory.gpu
    assert alone["reference policy"] == alone["learner: weights"] == 4 * B7.parameters
    assert alone["learner: weights of a pass"] == 2 * B7.parameters  # cast by autocast
    # Autocast of float32 weights keeps the residual stream in float32
    assert alone["activations"] == 17408 * (28 * 4 * 3584 + 32 * 3584 + 8 * 18944 + 4 * 512)


def test_a_node_has_all_weights_unless_they_are_spread_wider() -> None:
    config = changed("research-32b", engine="serve:tp=8,dp=1")
    one, two = (plan(config, nodes + "8xH200").memory.gpu for nodes in ("", "2x"))
    assert one["learner: weights"] == two["learner: weights"]
    wide = plan(replace(config, learner=replace(config.learner, shard_ranks=16)), "2x8xH200")
    assert wide.memory.gpu["learner: weights"] == pytest.approx(one["learner: weights"] / 2)
    assert one["sampler: weights"] == 2 * B32.parameters / 8
    with pytest.raises(ConfigError, match=r"shard-ranks 3.*16 ranks"):
        plan(replace(config, learner=replace(config.learner, shard_ranks=3)), "2x8xH200")


def test_optimizers_adapters_and_the_critic() -> None:
    def gpu(name: str, **settings: Any) -> dict[str, float]:
        return dict(plan(changed(name, engine="vllm", **settings), "8xH200").memory.gpu)

    assert gpu("research-7b", optimizer="adamw_offload")["learner: moments"] == 0
    offload = plan(changed("research-7b", optimizer="adamw_offload"), "8xH200").memory.host
    assert offload["weights, gradients and moments"] == pytest.approx(16 * B7.parameters)
    eight = plan(changed("research-7b", engine="vllm", optimizer="adamw_8bit"), "8xH200")
    assert not eight.fits and "one process only" in eight.memory.problem

    lora = gpu("research-7b", lora_rank=16)
    adapters = 16 * 28 * (2 * 7168 + 2 * (3584 + 512) + 3 * (3584 + 18944)) / 8
    assert lora["learner: adapters"] == lora["learner: gradients"] == 4 * adapters
    assert lora["learner: moments"] == 8 * adapters
    assert "reference policy" not in lora  # the model without its adapters

    critic = gpu("search-r1-ppo")["critic: weights and moments"]
    assert critic == pytest.approx(12 * (B7.parameters - 152064 * 3584) / 8)


def test_checkpoints_and_weight_files_by_hand() -> None:
    def disk(**settings: Any) -> dict[str, float]:
        return dict(plan(changed("research-7b", **settings), "8xH200").memory.disk)

    def saving(**settings: Any) -> float:
        found = plan(changed("research-7b", **settings), "8xH200")
        return found.times.parts["save, per step"]

    adapters = 16 * 28 * (2 * 7168 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    sizes = {
        "adamw": 12 * B7.parameters,
        "adamw_8bit": 6 * B7.parameters,
        "adamw_offload": 12 * B7.parameters,
    }
    for optimizer, size in sizes.items():
        assert disk(optimizer=optimizer)["one being written"] == size
        assert saving(optimizer=optimizer, save_every=5) == pytest.approx(size / 2e9 / 5)
    assert saving(lora_rank=16, save_every=5) == pytest.approx(
        (4 * B7.parameters + 12 * adapters) / 2e9 / 5
    )
    files = "TMPDIR: weights for the players"
    assert disk(engine="vllm", max_staleness=1)[files] == 2 * B7.parameters
    assert files not in disk(engine="vllm") and files not in disk(engine="serve", max_staleness=1)


def test_settings_that_do_not_divide_more_nodes_are_no_error() -> None:
    found = plan(changed("research-32b", shard_ranks=3), "3xL40S")
    assert not found.fits


def test_servers_take_nothing_of_the_learners_gpus() -> None:
    found = plan(changed("research-7b", engine="server:http://a,http://b"), "8xH100")
    assert not [name for name in found.memory.gpu if name.startswith("sampler")]
    assert found.sampler.copies == 2
    assert found.memory.servers["weights"] == 2 * B7.parameters
    assert sum(found.memory.servers.values()) == pytest.approx(0.9 * 84.9e9)
    large = plan(changed("research-32b", engine="server:http://a"), "8xL40S")
    assert large.sampler.tensor_parallel == 2  # the fewest GPUs that hold a copy
    assert large.memory.servers["weights"] == B32.parameters
    assert found.memory.disk["TMPDIR: weights for the servers"] == 2 * 2 * B7.parameters
    direct = plan(changed("research-7b", engine="server+nccl:http://a"), "8xH100")
    assert "TMPDIR: weights for the servers" not in direct.memory.disk


@pytest.mark.parametrize("engine", ["serve:tp=16", "serve:tp=4,dp=4", "vllm:tp=3", "serve:tp=3"])
def test_engines_that_do_not_divide_a_node_are_refused(engine: str) -> None:
    with pytest.raises(ConfigError, match=f"--engine {engine}: .*8 GPUs"):
        plan(changed("research-7b", engine=engine), "8xH100")


def test_copies_of_the_sampler() -> None:
    def copies(engine: str) -> int:
        return plan(changed("research-7b", engine=engine), "2x8xH100").sampler.copies

    assert copies("transformers") == copies("vllm") == 16
    assert copies("vllm:tp=4") == 4
    assert copies("serve:tp=4") == 2  # one per node
    assert copies("serve:tp=4,dp=2") == 4
    assert copies("server:http://a,http://b,http://c") == 3


@pytest.mark.parametrize("engine", ["transformers", "vllm", "serve:dp=8", "server:http://a"])
def test_players_that_sample_ahead_take_memory_of_their_own(engine: str) -> None:
    now, ahead = (
        plan(changed("research-7b", engine=engine, max_staleness=k), "8xH200").memory
        for k in (0, 1)
    )
    assert ahead.host["players"] == 8 * 4e9 and "players" not in now.host
    beside = 0.0 if engine.startswith("server") else 1e9
    assert ahead.gpu.get("sampler: CUDA", 0.0) == beside
    assert now.gpu.get("sampler: CUDA", 0.0) == (beside if engine == "serve:dp=8" else 0.0)


def test_vllm_over_several_gpus_is_for_one_process() -> None:
    several = plan(changed("research-7b", engine="vllm:tp=4"), "8xH200")
    assert not several.fits
    assert "vllm:tp=4 works in one process; with several ranks take serve:tp=4" in (
        several.memory.problem
    )


def test_what_is_on_its_way_to_the_sampler_counts() -> None:
    def peaks(engine: str, machines: str) -> dict[str, float]:
        return dict(plan(changed("research-7b", engine=engine), machines).memory.peaks)

    one = peaks("vllm", "1xH200")
    assert one["weights to the sampler"] - one["saving"] == 2 * B7.parameters
    head = 152_064 * 3_584  # more than a bucket of 1 GiB
    for engine, buffer in (
        ("serve:tp=1,dp=8", 2 * head),
        ("server+nccl:http://a", 2 * head),
        ("server:http://a", 0),
        ("vllm", 0),
    ):
        several = peaks(engine, "8xH200")
        bucket = 4 * head  # a converted copy beside it
        assert several["weights to the sampler"] - several["saving"] == bucket + buffer, engine


def test_a_sampler_without_room_for_an_episode_is_told() -> None:
    found = plan(changed("research-32b", engine="vllm"), "8xH200")
    assert not found.fits
    assert "weights and the cache of one episode are 71 GB" in found.memory.problem


CONFIGS = {  # what the authors' config.json says beside the sizes of ``SHAPES``
    "Qwen/Qwen2.5-0.5B": ("Qwen2Config", {}),
    "Qwen/Qwen2.5-1.5B": ("Qwen2Config", {}),
    "Qwen/Qwen2.5-3B": ("Qwen2Config", {"head_dim": 128}),
    "Qwen/Qwen2.5-7B": ("Qwen2Config", {}),
    "Qwen/Qwen2.5-32B": ("Qwen2Config", {}),
    "meta-llama/Llama-3.1-8B": ("LlamaConfig", {}),
}


def bytes_on_meta(config: TrainConfig, machines: Machines) -> dict[str, int]:
    """What the first rank of a run holds: the policy on the meta device, over a fake group.

    To be run in a process of its own, as a process has one group.
    """
    import torch
    import torch.distributed as dist
    import transformers
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from research_agent.algorithms.ppo import PPO
    from research_agent.distributed import local_tensor, make_mesh, shard
    from research_agent.models.critic import Critic
    from research_agent.models.lora import add_adapters
    from research_agent.models.policy import TokenLogprobs, gathered_units
    from research_agent.optimizer import Optimizer

    def held(tensors: Iterable[torch.Tensor]) -> int:
        return sum(local_tensor(t).numel() * t.element_size() for t in tensors)

    shape = read_shape(config.policy.model)
    kind, more = CONFIGS[config.policy.model.removesuffix("-Instruct")]
    made = getattr(transformers, kind)(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        **more,
    )
    os.environ["LOCAL_WORLD_SIZE"] = str(machines.per_node)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=machines.count)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        if config.learner.lora_rank:
            add_adapters(model, config.learner.lora_rank)
    body = copy.deepcopy(model.base_model)
    scorer = TokenLogprobs(model, precision="bfloat16")
    mesh = make_mesh(torch.device("cpu"), config.learner.shard_ranks)
    shard(scorer, gathered_units(model), mesh, half=True)
    learn = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = Optimizer(learn, learning_rate=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    for parameter in learn.values():
        parameter.grad = torch.zeros_like(parameter)
    gradients = held(p.grad for p in learn.values() if p.grad is not None)
    optimizer.step()
    moments = held(m for each in optimizer.moments().values() for m in each.values() if m.dim())
    found = {"weights": held(model.parameters()), "gradients": gradients, "moments": moments}
    if needs_critic(config):
        critic = Critic(model, PPO(), config.learner, body=body).model
        found["critic"] = 3 * held(critic.parameters())  # its moments are as large each
    return found


@pytest.mark.parametrize(
    ("name", "machines", "settings"),
    [
        ("research-7b", "8xH100", {}),
        ("research-32b", "2x8xH100", {}),
        ("r1-searcher-llama", "8x8xH200", {"shard_ranks": 64}),
        ("search-r1-ppo", "8x8xH200", {"shard_ranks": 64}),
        ("3b", "2x8xH100", {"shard_ranks": 16, "lora_rank": 32}),
        ("research-32b", "2x8xH100", {"shard_ranks": 16, "lora_rank": 32}),
    ],
)
def test_bytes_are_those_of_the_models_shards(
    name: str, machines: str, settings: dict[str, Any]
) -> None:
    """The whole model on the meta device, sharded by the learner's own functions."""
    config = changed("research-7b" if name == "3b" else name, engine="serve:tp=4,dp=2", **settings)
    if name == "3b":
        config = replace(config, policy=replace(config.policy, model="Qwen/Qwen2.5-3B"))
    found = plan(config, machines).memory.gpu
    with ProcessPoolExecutor(1, mp_context=FORKS) as pool:
        held = pool.submit(bytes_on_meta, config, parse_machines(machines)).result()
    counted = found["learner: weights"] + found.get("learner: adapters", 0)
    assert counted == pytest.approx(held["weights"], rel=0.02)
    assert found["learner: gradients"] == pytest.approx(held["gradients"], rel=0.02)
    assert found["learner: moments"] == pytest.approx(held["moments"], rel=0.02)
    assert found.get("critic: weights and moments", 0) == pytest.approx(
        held.get("critic", 0), rel=0.02
    )
    if not settings.get("lora_rank"):
        assert (
            found["reference policy"] == pytest.approx(held["weights"] / 2, rel=0.02)
            or not (config.algorithm.algorithm_args["kl_coef"])
        )


def test_heads_that_vllm_cannot_divide_are_told() -> None:
    found = plan(changed("research-7b", engine="serve:tp=8,dp=1"), "8xH200")
    assert not found.fits and "28 heads over tp=8" in found.memory.problem
    assert all("tp=8" not in flags for flags in found.suggestions)


def saved_bytes(
    layers: int, tokens: int, *, precision: str, checkpointing: bool, sharded: bool
) -> float:
    """Bytes that autograd keeps of a small Qwen2 with packed rows, by its number of layers."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from research_agent.models.prepare import prepare

    config = Qwen2Config(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=layers,
    )
    model = Qwen2ForCausalLM(config).float().eval()
    prepare(model, packing="on", gradient_checkpointing=checkpointing)
    if sharded and precision == "bfloat16":
        model = model.bfloat16()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    half = precision == "bfloat16" and not sharded
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        model.base_model(
            input_ids=torch.arange(tokens)[None],
            position_ids=torch.arange(tokens)[None],
            use_cache=False,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=tokens,
            max_length_k=tokens,
        )
    sizes = (t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    return float(sum(sizes))


@pytest.mark.parametrize(
    ("precision", "sharded"), [("bfloat16", True), ("bfloat16", False), ("float32", True)]
)
def test_activations_are_what_autograd_keeps(precision: str, sharded: bool) -> None:
    from research_agent.plan.memory import layer_bytes
    from research_agent.plan.shapes import Shape

    shape = Shape(1, 256, 8, 2, 1024, 300, False)
    config = changed("research-7b", precision=precision)
    inside, residual = layer_bytes(config, shape, Machines(1, 8 if sharded else 1, "H100"))
    for checkpointing, expected in ((False, inside), (True, residual)):
        one, three, more_of_one, more_of_three = (
            saved_bytes(
                layers,
                tokens,
                precision=precision,
                checkpointing=checkpointing,
                sharded=sharded,
            )
            for tokens in (32, 96)
            for layers in (1, 3)
        )
        of_a_layer = ((more_of_three - more_of_one) - (three - one)) / 2
        assert of_a_layer / 64 == pytest.approx(expected, rel=0.05)


# ---------------------------------------------------------------------------------------------
# Time


def test_seconds_of_passes_by_hand() -> None:
    config = changed("research-7b", engine="vllm")
    found = plan(config, "8xH100").times.parts
    tokens, rate = 256 * 5 * 1300 / 8, 0.3 * 989e12
    # Forward, backward and the forward pass again; before that old and reference log-probabilities
    assert found["forward and backward"] == pytest.approx(8 * B7.parameters * tokens / rate)
    assert found["forward passes before"] == pytest.approx(2 * 2 * B7.parameters * tokens / rate)
    assert found["weights to the sampler"] == pytest.approx(2 * B7.parameters / 30e9)
    assert found["save, per step"] == pytest.approx(12 * B7.parameters / 2e9 / 10)


def test_weights_through_files_take_the_disk_s_time() -> None:
    """Where the plan counts their bytes on the disk, it counts their seconds, too."""
    for staleness, by_disk, by_memory in (
        (0, ("server:http://a", "serve:tp=2"), ("vllm", "transformers", "serve:tp=1,dp=8")),
        (1, ("vllm", "transformers", "server:http://a"), ("serve:tp=1,dp=8",)),
    ):
        for engine in (*by_disk, *by_memory):
            config = changed("research-7b", engine=engine, max_staleness=staleness)
            found = plan(config, "8xH200")
            seconds = 2 * 2 * B7.parameters / 2e9 if engine in by_disk else 2 * B7.parameters / 30e9
            assert found.times.parts["weights to the sampler"] == pytest.approx(seconds), engine
            in_files = any(name.startswith("TMPDIR") for name in found.memory.disk)
            assert in_files == (engine in by_disk), engine


def test_no_rank_is_quicker_than_the_longest_episode() -> None:
    config = changed("research-7b", engine="vllm")
    longest = 6 * 1300
    found = plan(config, "128x8xH100").times.parts["forward and backward"]
    assert found == pytest.approx(8 * B7.parameters * longest / (0.3 * 989e12))
    updates = replace(config, learner=replace(config.learner, minibatches=4))
    assert plan(updates, "128x8xH100").times.parts["forward and backward"] == 4 * found


def test_weights_over_the_network_can_take_longer_than_the_passes() -> None:
    config = changed("research-32b", engine="serve:tp=8,dp=1")
    inside = plan(config, "32x8xH100").times.parts["forward and backward"]
    wide = replace(config, learner=replace(config.learner, shard_ranks=256))
    across = plan(wide, "32x8xH100").times.parts["forward and backward"]
    assert across == pytest.approx((2 + 2 + 4) * B32.parameters / (0.6 * 50e9))
    assert across > inside


def test_what_overlaps_is_not_added_up() -> None:
    assert all(PRESETS[name].sampling.overlap for name in PAPERS)
    lockstep = plan(changed("research-7b", engine="vllm", overlap=False), "8xH100").times
    overlap = plan(changed("research-7b", engine="vllm"), "8xH100").times  # as the preset says
    ahead = plan(changed("research-7b", engine="vllm", max_staleness=1), "8xH100").times
    assert lockstep.parts["wait for the environment"] > 100
    assert overlap.parts["wait for the environment"] == 1.5
    for times in (lockstep, overlap):
        assert times.step == pytest.approx(sum(times.parts.values()))
    sampling = ahead.parts["sample"] + ahead.parts["wait for the environment"]
    assert ahead.step == max(sampling, sum(ahead.parts.values()) - sampling) < overlap.step


def test_a_small_cache_samples_in_turns() -> None:
    """Beside 32 billion weights two GPUs have room for 142 episodes at a time, eight for 1,145."""
    two, eight = (
        plan(changed("research-32b", engine=f"serve:tp={tp},dp=1", overlap=True), "8xH200")
        for tp in (2, 8)
    )
    room = two.memory.gpu["sampler: keys and values"], eight.memory.gpu["sampler: keys and values"]
    per_token = 2 * B32.kv_numbers
    assert [int(r / (1300 * per_token / tp)) for r, tp in zip(room, (2, 8), strict=True)] == [
        142,
        1145,
    ]
    assert two.times.parts["sample"] > 3 * eight.times.parts["sample"]


# ---------------------------------------------------------------------------------------------
# Suggestions and the command line


@pytest.mark.parametrize("machines", MACHINES)
@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_fits_or_is_told_with_settings_that_do(
    name: str, machines: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(PRESETS[name], machines)
    assert found.fits or found.suggestions
    for suggestion in found.suggestions:
        flags, _, elsewhere = suggestion.partition(" on ")
        main(["train", name, *flags.split(), "--plan", elsewhere or machines])  # or exits with 2
        assert "does not fit" not in capsys.readouterr().out


def test_a_preset_of_7b_needs_no_more_than_vllm() -> None:
    for name in PAPERS:
        if "32b" not in name:
            assert plan(changed(name, engine="vllm:memory=0.3"), "8xH100").fits, name


def test_the_command_line_prints_a_plan_and_loads_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["train", "research-7b", "--plan", "2x8xH200", "--engine", "vllm"])
    out = capsys.readouterr().out
    assert out.startswith("research-7b on 2x8xH200, one rank per GPU, weights spread over 8\n")
    assert "Nothing of this was measured" in out and "does not fit" not in out
    with pytest.raises(SystemExit) as ended:
        main(["train", "research-32b", "--plan", "1xH100", "--json"])
    assert ended.value.code == 2
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False and told["suggestions"]
