"""verl: an agent loop that keeps the policy's own tokens and masks the observations.

Name it in the file of ``actor_rollout_ref.rollout.agent.agent_loop_config_path``:

.. code-block:: yaml

    - name: research_env
      _target_: research_env.adapters.verl.ResearchAgentLoop
      args: {dataset: musique, top_k: 3}

The rows of :func:`rows` are the training data; they choose this loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from omegaconf import OmegaConf

from research_env.adapters import require
from research_env.adapters.shared import shared_sessions
from research_env.adapters.tokens import TokenEpisode
from research_env.errors import ConfigurationError
from research_env.sessions import Session, Sessions

require("verl", "0.9", "verl")

from verl.experimental.agent_loop.agent_loop import (  # noqa: E402
    AgentLoopBase,
    AgentLoopMetrics,
    AgentLoopOutput,
    register,
)
from verl.utils.profiler import simple_timer  # noqa: E402

NAME = "research_env"


def rows(sessions: Sessions, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of a parquet file for ``data.train_files``, in the order of the seed."""
    return [
        {
            "data_source": NAME,
            "agent_name": NAME,
            "prompt": task["messages"],
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"question_id": task["id"], "index": number},
        }
        for number, task in enumerate(sessions.tasks(seed))
    ]


@register(NAME)
class ResearchAgentLoop(AgentLoopBase):  # type: ignore[misc]
    """One rollout per instance, in a coroutine; all share questions and engine."""

    def __init__(
        self,
        *positional: Any,
        args: Mapping[str, Any] | None = None,
        chat: bool = False,
        **keywords: Any,
    ) -> None:
        """Take verl's arguments, and ``args`` and ``chat`` of the file's entry.

        Args:
            *positional: for verl's base class.
            args: settings of :class:`research_env.sessions.Sessions`.
            chat: whether the tokenizer's chat template renders the prompt from messages.
            **keywords: for verl's base class.
        """
        super().__init__(*positional, **keywords)
        # verl reads its file with OmegaConf, whose lists are lists of its own.
        plain: Any = OmegaConf.to_container(OmegaConf.create(dict(args or {})), resolve=True)
        self._sessions = shared_sessions(plain)
        self._chat = chat

    async def run(
        self, sampling_params: dict[str, Any], priority: int = 0, **row: Any
    ) -> AgentLoopOutput:
        """Play one episode.

        All tokens of a void episode are masked, and its metric ``void`` is 1; verl cannot leave it
        out, so its reward 0 is part of its group's mean.

        Raises:
            ConfigurationError: the row has no ``extra_info["question_id"]``, or its prompt has more
                tokens than ``prompt_length``.
            UnknownTaskError: no task has this id.
        """
        session = self._open(row)
        prompt = await self._encode_prompt(session)
        stops = list(self._sessions.terminators)
        params = {**sampling_params, "stop": stops, "include_stop_str_in_output": True}
        budget, ends = self.rollout_config.response_length, (self.tokenizer.eos_token_id,)
        episode = TokenEpisode(session, self.tokenizer, budget, ends, self._chat)
        request, turns = uuid4().hex, 0
        steps: dict[str, Any] = {}  # the trainer's steps at the first and at the last turn
        seconds: dict[str, float] = {}
        while episode.end is None:
            with simple_timer("generate_sequences", seconds):
                sampled = await self.server_manager.generate(
                    request_id=request,
                    prompt_ids=prompt + episode.ids,
                    sampling_params={**params, "max_tokens": episode.room},
                )
            turns += 1
            steps = {**sampled.extra_fields, **steps}
            steps["max_global_steps"] = sampled.extra_fields.get("max_global_steps")
            # A turn that leaves room has ended by itself, unless verl has aborted it.
            complete = len(sampled.token_ids) < episode.room and sampled.stop_reason != "aborted"
            text = episode.add_turn(sampled.token_ids, sampled.log_probs, complete=complete)
            if text is not None:
                with simple_timer("tool_calls", seconds):
                    episode.add_output(await session.astep(text))
        void = episode.end.info["void"]
        return AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=episode.ids,
            response_mask=[0] * len(episode.mask) if void else episode.mask,
            response_logprobs=episode.logprobs,
            reward_score=session.total_reward(episode.end),
            num_turns=2 * turns,
            metrics=AgentLoopMetrics(**seconds),
            extra_fields={
                **steps,
                "turn_scores": [],
                "tool_rewards": [],
                "reward_extra_info": {**episode.end.info["metrics"], "void": float(void)},
            },
        )

    def _open(self, row: Mapping[str, Any]) -> Session:
        extra = row.get("extra_info") or {}
        if "question_id" not in extra:
            raise ConfigurationError(
                f"extra_info has no question_id, but {sorted(extra)}; make rows with "
                "research_env.adapters.verl.rows"
            )
        return self._sessions.open(str(extra["question_id"]))

    async def _encode_prompt(self, session: Session) -> list[int]:
        if self._chat:
            tools = self._sessions.core.tool_schemas() or None
            chat: list[int] = await self.ct_build_initial_tokens(
                session.info["messages"], tools=tools
            )
            return chat
        ids: list[int] = self.tokenizer(session.prompt)["input_ids"]
        limit = self.rollout_config.prompt_length
        if len(ids) > limit:
            raise ConfigurationError(
                f"the prompt of {session.info['question_id']!r} has {len(ids)} tokens; raise "
                f"actor_rollout_ref.rollout.prompt_length, which is {limit}"
            )
        return ids
