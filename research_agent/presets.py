"""Settings by name: the bundled world, and the papers'.

The papers' presets hold the settings of the paper, or where the paper is silent those of the
authors' published script; docs/papers.md has them side by side. They need the hardware of the
paper; every one can be changed by flags.
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
_SCRIPTS: Any = {"precision": "bfloat16", "checkpointing": True}  # as all of the authors have it

MINIWORLD = TrainConfig(
    preset="miniworld",
    environment=EnvironmentConfig(
        env="research_env:ReSearch-MiniWorld-v0",
        env_args={"split": "train", "template": "question", "top_k": 1},
    ),
    policy=PolicyConfig(model="miniworld-starter"),
    sampling=SamplingConfig(prompts=24, samples=8, max_prompt=96, max_response=384, max_turn=64),
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
# whole steps of 256. The instruct models: --model Qwen/Qwen2.5-7B-Instruct --chat-template
# --env-args template=instruct.
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
        prompts=256, samples=5, temperature=1.0, max_prompt=512, max_response=8192
    ),
    algorithm=AlgorithmConfig(
        algorithm="grpo", algorithm_args={"clip": 0.2, "kl_coef": 1e-3, "entropy_coef": 1e-3}
    ),
    learner=LearnerConfig(
        learning_rate=1e-6,
        updates=1,
        old_logprobs="recomputed",
        micro_batch_tokens=17408,
        **_SCRIPTS,
    ),
    run=RunConfig(steps=155, output=Path("runs/research-7b"), save_every=10, eval_args=_DEV),
)

RESEARCH_32B = TrainConfig(
    preset="research-32b",
    environment=RESEARCH_7B.environment,
    policy=PolicyConfig(model="Qwen/Qwen2.5-32B"),
    sampling=RESEARCH_7B.sampling,
    algorithm=RESEARCH_7B.algorithm,
    learner=RESEARCH_7B.learner,
    run=RunConfig(steps=155, output=Path("runs/research-32b"), save_every=10, eval_args=_DEV),
)

# Song et al. 2025, "R1-Searcher", section 4.1, and scripts/qwen_reinforce_plus_train.sh of the
# authors (64 tasks x 16, train batch 256, KL 0, the baseline of the group, AdamW's betas). The
# paper's tasks are HotpotQA and 2Wiki questions graded by difficulty: 350 for stage 1, 8,148 for
# stage 2 (127 steps an epoch).
R1_SEARCHER = TrainConfig(
    preset="r1-searcher",
    environment=EnvironmentConfig(
        env="research_env:SearchQA-v0",
        env_args={
            "dataset": "hotpotqa+2wiki",
            "split": "train",
            "retriever": _WIKIPEDIA,
            "top_k": 3,
            "max_searches": 8,
            "protocol": "r1-searcher",
            "reward": "r1-searcher-stage2",
            "template": "base",
        },
    ),
    policy=PolicyConfig(model="Qwen/Qwen2.5-7B"),
    sampling=SamplingConfig(
        prompts=64, samples=16, temperature=1.0, max_prompt=1024, max_response=29000
    ),
    algorithm=AlgorithmConfig(
        algorithm="reinforce_pp",
        algorithm_args={"baseline": "group", "clip": 0.2, "kl_coef": 0.0},
    ),
    learner=LearnerConfig(
        learning_rate=2e-6,
        updates=4,
        weight_decay=0.0,
        betas=(0.9, 0.95),
        old_logprobs="recomputed",
        micro_batch_tokens=32768,
        **_SCRIPTS,
    ),
    run=RunConfig(steps=127, output=Path("runs/r1-searcher"), save_every=20, eval_args=_DEV),
)

# Jin et al. 2025, "Search-R1", appendix B, and scripts/nq_hotpotqa/v0.2/train_grpo.sh of the
# authors: 512 x 5 in mini-batches of 256 trajectories, so 10 updates a step; warm-up over .285 of
# 1,005 steps; 500 tokens a turn; the entropy bonus is their configuration's default. The paper
# trains on Natural Questions and HotpotQA; here on HotpotQA.
SEARCH_R1 = TrainConfig(
    preset="search-r1",
    environment=EnvironmentConfig(
        env="research_env:ReSearch-HotpotQA-v0",
        env_args={
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
        prompts=512, samples=5, temperature=1.0, max_prompt=2048, max_response=4096, max_turn=500
    ),
    algorithm=AlgorithmConfig(
        algorithm="grpo", algorithm_args={"clip": 0.2, "kl_coef": 1e-3, "entropy_coef": 1e-3}
    ),
    learner=LearnerConfig(
        learning_rate=1e-6,
        warmup_steps=2860,
        updates=10,
        old_logprobs="recomputed",
        micro_batch_tokens=16384,
        **_SCRIPTS,
    ),
    run=RunConfig(steps=1005, output=Path("runs/search-r1"), save_every=100, eval_args=_DEV),
)

# The same with PPO, the paper's main results: scripts/nq_hotpotqa/v0.2/train_ppo.sh. One sample a
# task, mini-batches of 256, so 2 updates a step; the critic's warm-up is .015 of 1,005 steps.
SEARCH_R1_PPO = TrainConfig(
    preset="search-r1-ppo",
    environment=SEARCH_R1.environment,
    policy=SEARCH_R1.policy,
    sampling=replace(SEARCH_R1.sampling, samples=1),
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
    learner=replace(SEARCH_R1.learner, warmup_steps=572, updates=2),
    run=RunConfig(steps=1005, output=Path("runs/search-r1-ppo"), save_every=100, eval_args=_DEV),
)

PRESETS: dict[str, TrainConfig] = {
    preset.preset: preset
    for preset in (MINIWORLD, RESEARCH_7B, RESEARCH_32B, R1_SEARCHER, SEARCH_R1, SEARCH_R1_PPO)
}

DESCRIPTIONS: dict[str, str] = {
    "miniworld": "A small policy learns to search an invented world. Minutes on two CPU cores.",
    "research-7b": "ReSearch (Chen et al. 2025): GRPO, Qwen2.5-7B on MuSiQue.",
    "research-32b": "ReSearch (Chen et al. 2025): GRPO, Qwen2.5-32B on MuSiQue.",
    "r1-searcher": "R1-Searcher (Song et al. 2025), stage 2: REINFORCE++, Qwen2.5-7B. "
    "Stage 1: --env-args reward=r1-searcher-stage1.",
    "search-r1": "Search-R1 (Jin et al. 2025): GRPO, Qwen2.5-7B, exact match.",
    "search-r1-ppo": "Search-R1 (Jin et al. 2025): PPO with a critic, Qwen2.5-7B, exact match.",
}
