"""The search agent: the protocol's prompt, and the model searches as it likes.

With the weights of the baselines it is the zero-shot agent: nobody trained it to search. With
trained weights it is the papers' method. Both are played by the trainer's own collector, so that
nothing but the weights differs.
"""

from __future__ import annotations

from research_agent.rollout import collect as run

__all__ = ["run"]
