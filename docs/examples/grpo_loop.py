"""GRPO of one's own against the environment, with nothing but torch and transformers.

    python docs/examples/grpo_loop.py --steps 20

research_env plays and scores; sampling, token provenance, advantages and loss are here. The policy
is the small one of the demo, so no GPU is needed.
"""

from __future__ import annotations

import argparse

import gymnasium as gym
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import research_env  # noqa: F401  (registers the ids)
from research_agent.models.source import resolve_model  # only to find the demo's policy

CLIP, MAX_TURN_TOKENS, MAX_TOKENS, LEARNING_RATE = 0.2, 40, 400, 2e-4


def main() -> None:
    """Train, and print the mean reward of each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts-per-step", type=int, default=8, help="questions per step")
    parser.add_argument("--group-size", type=int, default=8, help="episodes per question")
    options = parser.parse_args()
    torch.manual_seed(0)
    folder = resolve_model("miniworld-starter")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    settings = {"autoreset_mode": "Disabled", "template": "question", "top_k": 1}
    count = options.prompts_per_step * options.group_size
    envs = gym.make_vec("ReSearch-MiniWorld-v0", num_envs=count, **settings)
    for step in range(options.steps):
        questions = range(step * options.prompts_per_step, (step + 1) * options.prompts_per_step)
        numbers = [number for number in questions for _ in range(options.group_size)]
        tokens, is_action, rewards = rollout(envs, model, tokenizer, numbers)
        groups = rewards.view(options.prompts_per_step, options.group_size)
        spread = groups.std(dim=1, keepdim=True) + 1e-6
        advantages = ((groups - groups.mean(dim=1, keepdim=True)) / spread).flatten()
        update(model, optimizer, tokens, is_action, advantages)
        print(f"step {step + 1}: mean reward {rewards.mean():.3f}", flush=True)
    envs.close()


def rollout(
    envs, model, tokenizer, numbers: list[int]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Play one episode per number; token ids, who wrote them, and rewards."""
    stops = list(envs.single_action_space.terminators)
    prompts, _ = envs.reset(seed=0, options={"episodes": numbers})
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = [encode(prompt) for prompt in prompts]
    is_action = [[False] * len(ids) for ids in tokens]
    rewards, active = torch.zeros(len(numbers)), list(range(len(numbers)))
    while active:
        turns = sample(model, tokenizer, [tokens[i] for i in active], stops)
        envs.send(active, [tokenizer.decode(turn, skip_special_tokens=True) for turn in turns])
        for i, turn in zip(active, turns, strict=True):
            tokens[i] += turn  # the ids that were sampled, not the text tokenized again
            is_action[i] += [True] * len(turn)
        active = []
        for result in envs.recv(min_results=len(turns)):
            i, rewards[result.env_id] = result.env_id, result.reward
            if not (result.terminated or result.truncated) and len(tokens[i]) < MAX_TOKENS:
                observation = encode(result.observation)
                tokens[i] += observation
                is_action[i] += [False] * len(observation)
                active.append(i)
    return [torch.tensor(ids) for ids in tokens], [torch.tensor(m) for m in is_action], rewards


@torch.no_grad()
def sample(model, tokenizer, contexts: list[list[int]], stops: list[str]) -> list[list[int]]:
    """Sample one turn per context, up to a terminator or the end token."""
    end = tokenizer.eos_token_id
    ids = [torch.tensor(context) for context in contexts]
    inputs = pad_sequence(ids, batch_first=True, padding_value=end, padding_side="left")
    mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True, padding_side="left")
    output = model.generate(
        inputs, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, pad_token_id=end,
        max_new_tokens=MAX_TURN_TOKENS, tokenizer=tokenizer,
        stop_strings=stops,
    )[:, inputs.shape[1] :].tolist()  # fmt: skip
    # Rows that stopped early are padded with the end token: keep the first one if it was sampled.
    turns = []
    for row in output:
        turn = row[: row.index(end) + 1] if end in row else row
        stopped = any(stop in tokenizer.decode(turn[:-1]) for stop in stops)
        turns.append(turn[:-1] if stopped and turn[-1] == end else turn)
    return turns


def update(model, optimizer, tokens: list[Tensor], is_action: list[Tensor], advantages) -> None:
    """One step of the clipped objective, averaged over each episode's action tokens."""
    ids = pad_sequence(tokens, batch_first=True)
    mask = pad_sequence(is_action, batch_first=True)[:, 1:]
    present = pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
    logits = model(ids, attention_mask=present).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    ratio = (logprobs - logprobs.detach()).exp()  # 1 at the only update; its gradient is not
    bounded = ratio.clamp(1 - CLIP, 1 + CLIP)
    objective = torch.minimum(ratio * advantages[:, None], bounded * advantages[:, None])
    weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / len(tokens)
    loss = -(weights * objective).sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


if __name__ == "__main__":
    main()
