"""Sample one turn per sequence with the model of a ``GRPOTrainer``, for :mod:`.trl`."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from research_env.adapters.tokens import decode

Sampled = tuple[list[list[int]], list[list[float]] | None]
"""The new tokens of each sequence, and their log-probabilities if they are known."""


def generate_turns(
    trainer: Any, sequences: list[list[int]], rooms: list[int], stops: tuple[str, ...]
) -> Sampled:
    """Sample one turn per sequence with the trainer's model and its settings.

    Args:
        trainer: a ``GRPOTrainer``.
        sequences: the tokens so far.
        rooms: the most new tokens of each sequence.
        stops: a turn ends after the first of these texts.

    Returns:
        The new tokens, up to the one that completes a terminator, or an end token. No
        log-probabilities: TRL computes them itself, as it does without ``rollout_func``.
    """
    from trl.models.utils import unwrap_model_for_generation  # noqa: PLC0415

    tokenizer = trainer._tokenizer
    batch = tokenizer.pad({"input_ids": sequences}, padding_side="left", return_tensors="pt")
    batch = batch.to(trainer.accelerator.device)
    config = copy.deepcopy(trainer.generation_config)
    config.update(max_new_tokens=max(rooms), stop_strings=list(stops))
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            generation_kwargs=trainer.generation_kwargs,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model,
        trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
    ):
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=config,
            tokenizer=tokenizer,
        )
    rows = output[:, batch["input_ids"].shape[1] :].tolist()
    ends = trainer.eos_token_ids
    turns = [
        _cut(row[:room], ends, tokenizer, stops) for row, room in zip(rows, rooms, strict=True)
    ]
    return turns, None


def _cut(row: list[int], ends: Sequence[int], tokenizer: Any, stops: tuple[str, ...]) -> list[int]:
    """The tokens up to the first end token or completed terminator; padding follows them."""
    row = row[: next((n + 1 for n, token in enumerate(row) if token in ends), len(row))]

    def stopped(length: int) -> bool:
        text = decode(tokenizer, row[:length])
        return any(stop in text for stop in stops)

    return row[: bisect_left(range(len(row)), True, key=stopped)]
