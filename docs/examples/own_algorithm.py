"""An algorithm of one's own: REINFORCE with a leave-one-out baseline, trained in MiniWorld.

python docs/examples/own_algorithm.py
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from research_agent import PRESETS, AlgorithmConfig, Batch, Tokens, train
from research_agent.algorithms.functional import leave_one_out_mean, token_mean


@dataclass(frozen=True)
class LeaveOneOut:
    """REINFORCE; each sample is compared with the mean of the other samples of its task."""

    entropy_coef: float = 0.0
    needs_reference: bool = False

    def advantages(self, batch: Batch) -> Tensor:
        """Reward minus the mean reward of the others, for each action token, [A]."""
        others = leave_one_out_mean(batch.rewards, batch.groups)
        return (batch.rewards - others)[batch.seq_ids]

    def weights(self, batch: Batch) -> Tensor:
        """The same weight for every action token, [A]."""
        return token_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probability times advantage, plus a bonus for entropy; logs the entropy bonus."""
        bonus = self.entropy_coef * tokens.entropy
        return tokens.logprobs * tokens.advantages + bonus, {"entropy_bonus": bonus}


def main() -> None:
    """Train two small steps in MiniWorld."""
    preset = PRESETS["miniworld"]
    summary = train(
        replace(
            preset,
            algorithm=AlgorithmConfig(f"{__name__}:LeaveOneOut", {"entropy_coef": 1e-3}),
            rollout=replace(preset.rollout, prompts_per_step=2),
            run=replace(preset.run, steps=2, eval_every=0, quiet=True, output=Path("runs/own")),
        )
    )
    print(summary.message)
    print(f"mean reward of the last step: {summary.numbers['reward last']:.3f}")


if __name__ == "__main__":
    main()
