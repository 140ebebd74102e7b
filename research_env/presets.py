"""Presets of the papers and of MiniWorld, as plain data for a trainer.

``research-agent`` finds them by the entry-point group ``research_agent.presets``. A preset has a
``description`` and, for sections of the trainer's configuration, their settings.

The papers' presets hold the settings of the paper or, where it does not say, of the authors'
published script; docs/reference/papers.md compares them. They need the hardware of the paper. Flags
override any setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Preset = dict[str, Any]

_WIKIPEDIA = "elasticsearch://localhost:9200/wiki18"
_DEV = {"split": "dev"}
_HOTPOTQA_DEV = {"dataset": "hotpotqa", **_DEV}
_INSTRUCT = {"template": "instruct"}
_SCRIPTS = {"precision": "bfloat16", "gradient_checkpointing": True}  # in all authors' scripts
# The papers' presets set ``overlap``: a search in Wikipedia takes long, and sampling need not wait.

_RESEARCH = "ReSearch (Chen et al. 2025): GRPO on MuSiQue"
_R1_SEARCHER = "R1-Searcher (Song et al. 2025): REINFORCE++ in two stages"
_SEARCH_R1 = "Search-R1 (Jin et al. 2025): exact match on NQ and HotpotQA"


def _derived(base: Preset, description: str, **sections: Mapping[str, Any]) -> Preset:
    """A preset with other settings in some sections; their ``env_args`` are merged, too."""
    made = {**base, "description": description}
    for section, settings in sections.items():
        made[section] = {**base[section], **settings}
        if "env_args" in settings:
            made[section]["env_args"] = {**base[section]["env_args"], **settings["env_args"]}
    return made


def _instruct(base: Preset, description: str, model: str, **sections: Mapping[str, Any]) -> Preset:
    """The preset for an instruct model: its chat template, and the paper's instruct prompt."""
    policy = {"model": model, "chat_template": True}
    environment = {"env_args": _INSTRUCT}
    return _derived(base, description, policy=policy, environment=environment, **sections)


MINIWORLD: Preset = {
    "description": "A small policy learns to search an invented world. Minutes on two CPU cores.",
    "environment": {
        "env": "research_env:ReSearch-MiniWorld-v0",
        "env_args": {"split": "train", "template": "question", "top_k": 1},
    },
    "policy": {"model": "miniworld-starter"},
    "sampling": {
        "max_prompt": 96,
        "max_response": 384,
        "max_turn_tokens": 64,
    },
    "rollout": {"prompts_per_step": 24, "group_size": 8},
    "algorithm": {
        "algorithm": "grpo",
        "algorithm_args": {"kl_coef": 0.0, "entropy_coef": 0.0},
    },
    "learner": {
        "learning_rate": 2e-4,
        "warmup_steps": 3,
        "weight_decay": 0.0,
        "micro_batch_tokens": 4096,
    },
    "run": {
        "steps": 80,
        "save_every": 20,
        "eval_every": 20,
        "eval_limit": 200,
        "eval_args": _DEV,
    },
}

# A pretrained model on real passages, sized for a laptop. The prompt is the question alone, since
# supervised fine-tuning has taught the format. MuSiQue is left out, to evaluate out of domain.
SMOLLM2_WIKI: Preset = {
    "description": "SmolLM2-135M learns to search real passages, after research-agent sft "
    "smollm2-wiki. Hours on a laptop.",
    "environment": {
        "env": "research_env:SearchQA-v0",
        "env_args": {
            "dataset": "hotpotqa+2wiki",
            "split": "train-gold[50%:]",  # sft smollm2-wiki demonstrates the others
            "protocol": "research",
            "reward": "research",
            "template": "question",
            "top_k": 2,
            "max_searches": 4,
            "max_passage_chars": 600,
            "turn_reward": "0.2*new_support",  # without it, guesses pay more than searches
        },
    },
    "policy": {"model": "./runs/smollm2-start"},
    "sampling": {
        "max_prompt": 256,
        "max_response": 1536,
        "max_turn_tokens": 192,  # a search comes after a note, which can be a long sentence
    },
    "rollout": {"prompts_per_step": 4, "group_size": 8},
    "algorithm": {
        "algorithm": "grpo",
        "algorithm_args": {"kl_coef": 0.0, "entropy_coef": 0.0},
    },
    "learner": {
        "learning_rate": 1e-4,  # at 2e-4 the policy fell apart after 35 steps
        "warmup_steps": 3,
        "weight_decay": 0.0,
        "micro_batch_tokens": 2048,
        "packing": "on",  # 9 % faster on a CPU
        "lora_rank": 16,
    },
    "run": {"steps": 60, "save_every": 10, "eval_every": 5, "eval_limit": 100, "eval_args": _DEV},
}

# Chen et al. 2025, "ReSearch", section 4.1 and appendix. Two epochs of 19,938 questions make 155
# full steps of 256.
RESEARCH_7B: Preset = {
    "description": f"{_RESEARCH}, Qwen2.5-7B.",
    "environment": {
        "env": "research_env:ReSearch-MuSiQue-v0",
        "env_args": {
            "split": "train",
            "retriever": _WIKIPEDIA,
            "top_k": 5,
            "protocol": "research",
            "reward": "research",
            "template": "base",
        },
    },
    "policy": {"model": "Qwen/Qwen2.5-7B"},
    "sampling": {
        "temperature": 1.0,
        "overlap": True,
        "max_prompt": 512,
        "max_response": 8192,
    },
    "rollout": {"prompts_per_step": 256, "group_size": 5},
    "algorithm": {
        "algorithm": "grpo",
        "algorithm_args": {"clip": 0.2, "kl_coef": 1e-3, "entropy_coef": 1e-3},
    },
    "learner": {
        "learning_rate": 1e-6,
        "minibatches": 1,
        "old_logprobs": "recomputed",
        "micro_batch_tokens": 17408,
        **_SCRIPTS,
    },
    "run": {"steps": 155, "save_every": 10, "eval_args": _DEV},
}

# train_multi_node.sh of Agent-RL/ReCall, branch main, and its ppo_trainer.yaml: 256 x 5 in
# mini-batches of 64 tasks, turns of 512 tokens. The authors train on SynTool and MuSiQue; this
# preset on MuSiQue alone.
RECALL_7B = _derived(
    RESEARCH_7B,
    "ReCall (Chen et al. 2025): GRPO with tool calls on MuSiQue, Qwen2.5-7B-Instruct.",
    environment={"env_args": {"protocol": "recall", "reward": "recall", **_INSTRUCT}},
    policy={"model": "Qwen/Qwen2.5-7B-Instruct", "chat_template": True},
    sampling={"max_prompt": 1536, "max_response": 6656, "max_turn_tokens": 512},
    learner={"minibatches": 4, "micro_batch_tokens": 16384},
)

# Song et al. 2025, "R1-Searcher", section 4.1, and scripts/qwen_reinforce_plus_train.sh of the
# authors (64 tasks x 16, train batch 256, KL 0, the baseline of the group, AdamW's betas). Stage 1
# has 350 questions of HotpotQA and 2Wiki; stage 2 has 8,148, graded by difficulty. Neither paper
# nor scripts say how long a stage is: here about one pass.
R1_SEARCHER_QWEN: Preset = {
    "description": f"{_R1_SEARCHER}, Qwen2.5-7B.",
    "environment": {
        "env": "research_env:SearchQA-v0",
        "env_args": {
            "dataset": "r1-searcher",
            "retriever": _WIKIPEDIA,
            "top_k": 3,
            "max_searches": 8,
            "protocol": "r1-searcher",
            "template": "base",
        },
    },
    "policy": {"model": "Qwen/Qwen2.5-7B"},
    "sampling": {
        "temperature": 1.0,
        "overlap": True,
        "max_prompt": 1024,
        "max_response": 29000,
    },
    "rollout": {
        "prompts_per_step": 64,
        "group_size": 16,
        "stages": (
            "steps=6 split=stage-1 reward=r1-searcher-stage1",
            "split=stage-2 reward=r1-searcher-stage2",
        ),
    },
    "algorithm": {
        "algorithm": "reinforce_pp",
        "algorithm_args": {"baseline": "group", "clip": 0.2, "kl_coef": 0.0},
    },
    "learner": {
        "learning_rate": 2e-6,
        "minibatches": 4,
        "weight_decay": 0.0,
        "betas": (0.9, 0.95),
        "old_logprobs": "recomputed",
        "micro_batch_tokens": 32768,
        **_SCRIPTS,
    },
    "run": {"steps": 6 + 127, "save_every": 20, "eval_args": _HOTPOTQA_DEV},
}

# The authors' scripts llama_reinforce_plus_train_stage1.sh and ..._stage2.sh: the instruct model,
# 65 tasks per step, KL 1e-4 in the reward, and a format penalty of 1 instead of 2. Their stage 1
# differs: 15 tasks per step, and the group's standard deviation (`group_norm`).
R1_SEARCHER_LLAMA = _instruct(
    R1_SEARCHER_QWEN,
    f"{_R1_SEARCHER}, Llama-3.1-8B-Instruct.",
    "meta-llama/Llama-3.1-8B-Instruct",
    rollout={
        "prompts_per_step": 65,
        "stages": (
            "steps=6 split=stage-1 reward=r1-searcher-stage1",
            "split=stage-2 reward=r1-searcher-stage2-llama",
        ),
    },
    algorithm={"algorithm_args": {"baseline": "group", "clip": 0.2, "kl_coef": 1e-4}},
    run={"steps": 6 + 125},
)

# Jin et al. 2025, "Search-R1", appendix B, and scripts/nq_hotpotqa/v0.2/train_grpo.sh of the
# authors: 512 x 5 in mini-batches of 256 trajectories, so 10 per step; warm-up over .285 of 1,005
# steps; 500 tokens per turn; the entropy bonus is their configuration's default.
SEARCH_R1_GRPO: Preset = {
    "description": f"{_SEARCH_R1}, GRPO, Qwen2.5-7B.",
    "environment": {
        "env": "research_env:SearchQA-v0",
        "env_args": {
            "dataset": "nq+hotpotqa",
            "split": "train",
            "retriever": _WIKIPEDIA,
            "top_k": 3,
            "max_searches": 4,
            "protocol": "search-r1",
            "reward": "search-r1",
            "template": "base",
        },
    },
    "policy": {"model": "Qwen/Qwen2.5-7B"},
    "sampling": {
        "temperature": 1.0,
        "overlap": True,
        "max_prompt": 2048,
        "max_response": 4096,
        "max_turn_tokens": 500,
    },
    "rollout": {"prompts_per_step": 512, "group_size": 5},
    "algorithm": {
        "algorithm": "grpo",
        "algorithm_args": {"clip": 0.2, "kl_coef": 1e-3, "entropy_coef": 1e-3},
    },
    "learner": {
        "learning_rate": 1e-6,
        "warmup_steps": 2860,
        "minibatches": 10,
        "old_logprobs": "recomputed",
        "micro_batch_tokens": 16384,
        **_SCRIPTS,
    },
    "run": {"steps": 1005, "save_every": 100, "eval_args": _HOTPOTQA_DEV},
}

# PPO, the paper's main results: scripts/nq_hotpotqa/v0.2/train_ppo.sh. One sample per task,
# mini-batches of 256, so 2 per step; the critic's warm-up is .015 of 1,005 steps.
SEARCH_R1_PPO = _derived(
    SEARCH_R1_GRPO,
    f"{_SEARCH_R1}, PPO with a critic, Qwen2.5-7B.",
    rollout={"group_size": 1},
    algorithm={
        "algorithm": "ppo",
        "algorithm_args": {
            "clip": 0.2,
            "kl_coef": 1e-3,
            "entropy_coef": 1e-3,
            "gamma": 1.0,
            "lam": 1.0,
            "value_clip": 0.5,
            "critic_learning_rate": 1e-5,
            "critic_warmup_steps": 30,
        },
    },
    learner={"warmup_steps": 572, "minibatches": 2},
)

_PAPERS = {
    "research-7b": RESEARCH_7B,
    "research-7b-instruct": _instruct(
        RESEARCH_7B, f"{_RESEARCH}, Qwen2.5-7B-Instruct.", "Qwen/Qwen2.5-7B-Instruct"
    ),
    "research-32b": _derived(
        RESEARCH_7B, f"{_RESEARCH}, Qwen2.5-32B.", policy={"model": "Qwen/Qwen2.5-32B"}
    ),
    "research-32b-instruct": _instruct(
        RESEARCH_7B, f"{_RESEARCH}, Qwen2.5-32B-Instruct.", "Qwen/Qwen2.5-32B-Instruct"
    ),
    "recall-7b": RECALL_7B,
    "r1-searcher-qwen": R1_SEARCHER_QWEN,
    "r1-searcher-llama": R1_SEARCHER_LLAMA,
    "search-r1-grpo": SEARCH_R1_GRPO,
    "search-r1-ppo": SEARCH_R1_PPO,
}

# What takes the place of the papers' stages and rewards in MiniWorld, whose shipped policy writes
# ReSearch's tags. ReCall's tool calls have a policy of their own.
_TWO_STAGES = {
    "stages": ("steps=10 until=0.9 reward=0.5*retrieved+0.5*format", "reward=f1+2*format")
}
_EXACT_MATCH = {"env_args": {"reward": "em", "max_searches": 4}}
_TOOL_CALLS = {
    "env_args": {
        "protocol": "recall",
        "reward": "recall",
        "template": "{question}\n<think>",  # ReCall's own prompt opens the thought, too
    }
}
_MINI: dict[str, dict[str, dict[str, Any]]] = {
    "recall-7b": {"environment": _TOOL_CALLS, "policy": {"model": "miniworld-tools-starter"}},
    "r1-searcher-qwen": {"rollout": _TWO_STAGES},
    "r1-searcher-llama": {"rollout": _TWO_STAGES},
    "search-r1-grpo": {"environment": _EXACT_MATCH},
    "search-r1-ppo": {"environment": _EXACT_MATCH},
}


def _mini(name: str) -> Preset:
    """A paper's recipe in MiniWorld.

    The paper sets the algorithm, the kind of reward, the stages and the updates per step; MiniWorld
    sets the model, the learning rate and the number of episodes.
    """
    paper = _PAPERS[name]
    args = paper["algorithm"]["algorithm_args"]
    if "critic_learning_rate" in args:
        args = {**args, "critic_learning_rate": 2e-4, "critic_warmup_steps": 0}
    learner = {key: paper["learner"][key] for key in ("minibatches", "old_logprobs")}
    return _derived(
        MINIWORLD,
        f"The recipe of {name} in MiniWorld. Minutes.",
        **_MINI.get(name, {}),
        algorithm={**paper["algorithm"], "algorithm_args": args},
        learner=learner,
        run={"steps": 30, "eval_every": 10},
    )


PRESETS: dict[str, Preset] = {
    "miniworld": MINIWORLD,
    "smollm2-wiki": SMOLLM2_WIKI,
    **_PAPERS,
    **{f"{name}-mini": _mini(name) for name in _PAPERS},
}
"""Presets by name, for the entry point ``research_agent.presets``."""

SFT_PRESETS: dict[str, Preset] = {
    "miniworld": {
        "description": "Teach a new policy to read and search in MiniWorld, and to do so seldom: a "
        "start for the demo.",
        "demonstrations": "research_env.demonstrations:demonstrations",
        "demonstration_args": {"top_k": 1},
        "vocabulary": "research_env.demonstrations:vocabulary",
        "count": 66_000,
        "batch_by_length": True,  # gives the short guesses, the habit, more weight
        "learning_rate": 2e-3,
        "decay_share": 1.0,
        "final_share": 0.2,  # the habits come last, at this share of the learning rate
        "threads": 1,  # as fast as two, and the same bits on any number of cores
        "output": "runs/miniworld-starter",
    },
    "smollm2-wiki": {
        "description": "Show SmolLM2-135M how to search real passages, and to do so most of the "
        "time: the start of research-agent train smollm2-wiki.",
        "demonstrations": "research_env.wiki_demonstrations:demonstrations",
        "demonstration_args": {
            "dataset": "hotpotqa+2wiki",
            "split": "train-gold[:50%]",
            "top_k": 2,
            "max_passage_chars": 600,
            "facts": True,
            "search": 0.7,
            "go_on": 0.8,
        },
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "bare_text": True,  # as it is trained and evaluated
        "count": 800,
        "save_every": 10,  # three minutes on two cores
        "batch": 8,
        "micro_batch_tokens": 512,  # demonstrations differ in length: 2048 would hold 45 % padding
        "lora_rank": 32,  # half the time on a CPU
        "learning_rate": 2e-3,
        "warmup_steps": 10,
        "output": "runs/smollm2-start",
    },
}
"""Presets of supervised fine-tuning, for the entry point ``research_agent.sft_presets``."""
