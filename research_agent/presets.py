"""Settings by name: the bundled world, and the papers'.

The papers' presets hold the settings of the paper, or where the paper is silent those of the
authors' published script; docs/reference/papers.md has them side by side. They need the hardware
of the paper; every one can be changed by flags.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from research_agent.config import (
    AlgorithmConfig,
    EnvironmentConfig,
    LearnerConfig,
    PolicyConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)

_WIKIPEDIA = "elasticsearch://localhost:9200/wiki18"
_DEV = {"split": "dev"}
_HOTPOTQA_DEV = {"dataset": "hotpotqa", **_DEV}
_SCRIPTS: Any = {
    "precision": "bfloat16",
    "gradient_checkpointing": True,
}  # as all of the authors have it

MINIWORLD = TrainConfig(
    preset="miniworld",
    environment=EnvironmentConfig(
        env="research_env:ReSearch-MiniWorld-v0",
        env_args={"split": "train", "template": "question", "top_k": 1},
    ),
    policy=PolicyConfig(model="miniworld-starter"),
    sampling=SamplingConfig(
        prompts_per_step=24, group_size=8, max_prompt=96, max_response=384, max_turn_tokens=64
    ),
    algorithm=AlgorithmConfig(
        algorithm="grpo", algorithm_args={"kl_coef": 0.0, "entropy_coef": 0.0}
    ),
    learner=LearnerConfig(
        learning_rate=2e-4, warmup_steps=3, weight_decay=0.0, micro_batch_tokens=4096
    ),
    run=RunConfig(
        steps=80,
        output=Path("runs/miniworld"),
        save_every=20,
        eval_every=20,
        eval_limit=200,
        eval_args=_DEV,
    ),
)

# Chen et al. 2025, "ReSearch", section 4.1 and appendix; two epochs of 19,938 questions are 155
# whole steps of 256.
RESEARCH_7B = TrainConfig(
    preset="research-7b",
    environment=EnvironmentConfig(
        env="research_env:ReSearch-MuSiQue-v0",
        env_args={
            "split": "train",
            "retriever": _WIKIPEDIA,
            "top_k": 5,
            "protocol": "research",
            "reward": "research",
            "template": "base",
        },
    ),
    policy=PolicyConfig(model="Qwen/Qwen2.5-7B"),
    sampling=SamplingConfig(
        prompts_per_step=256, group_size=5, temperature=1.0, max_prompt=512, max_response=8192
    ),
    algorithm=AlgorithmConfig(
        algorithm="grpo", algorithm_args={"clip": 0.2, "kl_coef": 1e-3, "entropy_coef": 1e-3}
    ),
    learner=LearnerConfig(
        learning_rate=1e-6,
        minibatches=1,
        old_logprobs="recomputed",
        micro_batch_tokens=17408,
        **_SCRIPTS,
    ),
    run=RunConfig(steps=155, output=Path("runs/research-7b"), save_every=10, eval_args=_DEV),
)


def _named(of: TrainConfig, name: str, model: str) -> TrainConfig:
    run = replace(of.run, output=Path("runs") / name)
    return replace(of, preset=name, policy=replace(of.policy, model=model), run=run)


def _instruct(of: TrainConfig, name: str, model: str) -> TrainConfig:
    """The same for a model that was tuned to follow instructions: its chat template."""
    args = of.environment.env_args | {"template": "instruct"}
    chat = replace(
        of,
        environment=replace(of.environment, env_args=args),
        policy=replace(of.policy, chat_template=True),
    )
    return _named(chat, name, model)


RESEARCH_32B = _named(RESEARCH_7B, "research-32b", "Qwen/Qwen2.5-32B")
RESEARCH_7B_INSTRUCT = _instruct(RESEARCH_7B, "research-7b-instruct", "Qwen/Qwen2.5-7B-Instruct")
RESEARCH_32B_INSTRUCT = _instruct(RESEARCH_7B, "research-32b-instruct", "Qwen/Qwen2.5-32B-Instruct")

# Song et al. 2025, "R1-Searcher", section 4.1, and scripts/qwen_reinforce_plus_train.sh of the
# authors (64 tasks x 16, train batch 256, KL 0, the baseline of the group, AdamW's betas). Stage 1
# has 350 questions of HotpotQA and 2Wiki, stage 2 has 8,148, graded by difficulty; neither paper
# nor scripts say when the first ends: here after one pass over its questions, and one over the
# others'.
R1_SEARCHER_QWEN = TrainConfig(
    preset="r1-searcher-qwen",
    environment=EnvironmentConfig(
        env="research_env:SearchQA-v0",
        env_args={
            "dataset": "r1-searcher",
            "retriever": _WIKIPEDIA,
            "top_k": 3,
            "max_searches": 8,
            "protocol": "r1-searcher",
            "template": "base",
        },
        stages=(
            "steps=6 split=stage-1 reward=r1-searcher-stage1",
            "split=stage-2 reward=r1-searcher-stage2",
        ),
    ),
    policy=PolicyConfig(model="Qwen/Qwen2.5-7B"),
    sampling=SamplingConfig(
        prompts_per_step=64, group_size=16, temperature=1.0, max_prompt=1024, max_response=29000
    ),
    algorithm=AlgorithmConfig(
        algorithm="reinforce_pp",
        algorithm_args={"baseline": "group", "clip": 0.2, "kl_coef": 0.0},
    ),
    learner=LearnerConfig(
        learning_rate=2e-6,
        minibatches=4,
        weight_decay=0.0,
        betas=(0.9, 0.95),
        old_logprobs="recomputed",
        micro_batch_tokens=32768,
        **_SCRIPTS,
    ),
    run=RunConfig(
        steps=6 + 127, output=Path("runs/r1-searcher-qwen"), save_every=20, eval_args=_HOTPOTQA_DEV
    ),
)

# The authors' scripts llama_reinforce_plus_train_stage1.sh and ..._stage2.sh: the instruct model,
# 65 tasks in stage 2 (15 in stage 1, here 65), KL 1e-4 in the reward, which takes 1 off for the
# format and not 2. Stage 1 has the group's standard deviation, too (`group_norm`): here as stage 2.
R1_SEARCHER_LLAMA = _instruct(
    replace(
        R1_SEARCHER_QWEN,
        environment=replace(
            R1_SEARCHER_QWEN.environment,
            stages=(
                "steps=6 split=stage-1 reward=r1-searcher-stage1",
                "split=stage-2 reward=r1-searcher-stage2-llama",
            ),
        ),
        sampling=replace(R1_SEARCHER_QWEN.sampling, prompts_per_step=65),
        algorithm=AlgorithmConfig(
            algorithm="reinforce_pp",
            algorithm_args={"baseline": "group", "clip": 0.2, "kl_coef": 1e-4},
        ),
        run=replace(R1_SEARCHER_QWEN.run, steps=6 + 125),
    ),
    "r1-searcher-llama",
    "meta-llama/Llama-3.1-8B-Instruct",
)

# Jin et al. 2025, "Search-R1", appendix B, and scripts/nq_hotpotqa/v0.2/train_grpo.sh of the
# authors: 512 x 5 in mini-batches of 256 trajectories, so 10 updates a step; warm-up over .285 of
# 1,005 steps; 500 tokens a turn; the entropy bonus is their configuration's default.
SEARCH_R1_GRPO = TrainConfig(
    preset="search-r1-grpo",
    environment=EnvironmentConfig(
        env="research_env:SearchQA-v0",
        env_args={
            "dataset": "nq+hotpotqa",
            "split": "train",
            "retriever": _WIKIPEDIA,
            "top_k": 3,
            "max_searches": 4,
            "protocol": "search-r1",
            "reward": "search-r1",
            "template": "base",
        },
    ),
    policy=PolicyConfig(model="Qwen/Qwen2.5-7B"),
    sampling=SamplingConfig(
        prompts_per_step=512,
        group_size=5,
        temperature=1.0,
        max_prompt=2048,
        max_response=4096,
        max_turn_tokens=500,
    ),
    algorithm=AlgorithmConfig(
        algorithm="grpo", algorithm_args={"clip": 0.2, "kl_coef": 1e-3, "entropy_coef": 1e-3}
    ),
    learner=LearnerConfig(
        learning_rate=1e-6,
        warmup_steps=2860,
        minibatches=10,
        old_logprobs="recomputed",
        micro_batch_tokens=16384,
        **_SCRIPTS,
    ),
    run=RunConfig(
        steps=1005, output=Path("runs/search-r1-grpo"), save_every=100, eval_args=_HOTPOTQA_DEV
    ),
)

# The same with PPO, the paper's main results: scripts/nq_hotpotqa/v0.2/train_ppo.sh. One sample a
# task, mini-batches of 256, so 2 updates a step; the critic's warm-up is .015 of 1,005 steps.
SEARCH_R1_PPO = TrainConfig(
    preset="search-r1-ppo",
    environment=SEARCH_R1_GRPO.environment,
    policy=SEARCH_R1_GRPO.policy,
    sampling=replace(SEARCH_R1_GRPO.sampling, group_size=1),
    algorithm=AlgorithmConfig(
        algorithm="ppo",
        algorithm_args={
            "clip": 0.2,
            "kl_coef": 1e-3,
            "entropy_coef": 1e-3,
            "gamma": 1.0,
            "lam": 1.0,
            "value_clip": 0.5,
            "critic_learning_rate": 1e-5,
            "critic_warmup_steps": 30,
        },
    ),
    learner=replace(SEARCH_R1_GRPO.learner, warmup_steps=572, minibatches=2),
    run=replace(SEARCH_R1_GRPO.run, output=Path("runs/search-r1-ppo")),
)


def _mini(of: TrainConfig, stages: tuple[str, ...] = (), **env_args: Any) -> TrainConfig:
    """A paper's recipe in MiniWorld, from the shipped starter, which writes ReSearch's tags.

    The algorithm with the paper's settings, its kind of reward, its stages and its updates a step;
    model, learning rate and number of episodes are the small world's.
    """
    name = f"{of.preset}-mini"
    args = of.algorithm.algorithm_args
    if "critic_learning_rate" in args:
        args = args | {"critic_learning_rate": 2e-4, "critic_warmup_steps": 0}
    return replace(
        MINIWORLD,
        preset=name,
        environment=replace(
            MINIWORLD.environment,
            env_args=MINIWORLD.environment.env_args | env_args,
            stages=stages,
        ),
        algorithm=replace(of.algorithm, algorithm_args=args),
        learner=replace(
            MINIWORLD.learner,
            minibatches=of.learner.minibatches,
            old_logprobs=of.learner.old_logprobs,
        ),
        run=replace(MINIWORLD.run, steps=30, eval_every=10, output=Path("runs") / name),
    )


_TWO_STAGES = ("steps=10 until=0.9 reward=0.5*retrieved+0.5*format", "reward=f1+2*format")
_PAPERS = (
    RESEARCH_7B,
    RESEARCH_7B_INSTRUCT,
    RESEARCH_32B,
    RESEARCH_32B_INSTRUCT,
    R1_SEARCHER_QWEN,
    R1_SEARCHER_LLAMA,
    SEARCH_R1_GRPO,
    SEARCH_R1_PPO,
)
_MINIS = (
    *(_mini(each) for each in _PAPERS[:4]),
    *(_mini(each, _TWO_STAGES) for each in _PAPERS[4:6]),
    *(_mini(each, reward="em", max_searches=4) for each in _PAPERS[6:]),
)
PRESETS: dict[str, TrainConfig] = {each.preset: each for each in (MINIWORLD, *_PAPERS, *_MINIS)}

_RESEARCH = "ReSearch (Chen et al. 2025): GRPO on MuSiQue"
_R1_SEARCHER = "R1-Searcher (Song et al. 2025): REINFORCE++ in two stages"
_SEARCH_R1 = "Search-R1 (Jin et al. 2025): exact match on NQ and HotpotQA"
DESCRIPTIONS: dict[str, str] = {
    "miniworld": "A small policy learns to search an invented world. Minutes on two CPU cores.",
    "research-7b": f"{_RESEARCH}, Qwen2.5-7B.",
    "research-7b-instruct": f"{_RESEARCH}, Qwen2.5-7B-Instruct.",
    "research-32b": f"{_RESEARCH}, Qwen2.5-32B.",
    "research-32b-instruct": f"{_RESEARCH}, Qwen2.5-32B-Instruct.",
    "r1-searcher-qwen": f"{_R1_SEARCHER}, Qwen2.5-7B.",
    "r1-searcher-llama": f"{_R1_SEARCHER}, Llama-3.1-8B-Instruct.",
    "search-r1-grpo": f"{_SEARCH_R1}, GRPO, Qwen2.5-7B.",
    "search-r1-ppo": f"{_SEARCH_R1}, PPO with a critic, Qwen2.5-7B.",
} | {each.preset: f"The recipe of {each.preset[:-5]} in MiniWorld. Minutes." for each in _MINIS}
