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

from research_env.adapters import require
from research_env.adapters.shared import shared_sessions
from research_env.adapters.tokens import decode, encode_observation
from research_env.errors import ConfigurationError
from research_env.sessions import Sessions

require("verl", "0.9", "verl")

from verl.experimental.agent_loop.agent_loop import (  # noqa: E402
    AgentLoopBase,
    AgentLoopMetrics,
    AgentLoopOutput,
    register,
)

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
        """Take verl's arguments, and those of the file.

        Args:
            *positional: verl's.
            args: settings of :class:`research_env.sessions.Sessions`.
            chat: the prompt is chat messages, rendered by the tokenizer's chat template.
            **keywords: verl's.
        """
        super().__init__(*positional, **keywords)
        self._sessions = shared_sessions(dict(args or {}))
        self._chat = chat
        self._tools = self._sessions.core.tool_schemas() if chat else []
        self._markup = chat and self._sessions.core.protocol.tool_format is not None

    async def run(
        self, sampling_params: dict[str, Any], priority: int = 0, **row: Any
    ) -> AgentLoopOutput:
        """Play one episode.

        A void episode is masked altogether and has the metric ``void``; verl cannot leave it out,
        so its reward 0 is part of its group's mean.

        Raises:
            ConfigurationError: the row has no ``extra_info["question_id"]``.
            UnknownTaskError: no task has this id.
        """
        extra = row.get("extra_info") or {}
        if "question_id" not in extra:
            raise ConfigurationError(
                f"extra_info has no question_id, but {sorted(extra)}; make rows with "
                "research_env.adapters.verl.rows"
            )
        session = self._sessions.open(str(extra["question_id"]))
        stops = self._sessions.terminators
        params = {**sampling_params, "stop": list(stops), "include_stop_str_in_output": True}
        if self._chat:
            prompt = await self.ct_build_initial_tokens(
                session.info["messages"], tools=self._tools or None
            )
        else:
            prompt = self.tokenizer(session.prompt, add_special_tokens=False)["input_ids"]
        ids: list[int] = []
        mask: list[int] = []
        logprobs: list[float] = []
        request, limit, turns, output = uuid4().hex, self.rollout_config.response_length, 0, None
        while output is None or not session.episode.over:
            sampled = await self.server_manager.generate(
                request_id=request,
                prompt_ids=prompt + ids,
                sampling_params={**params, "max_tokens": limit - len(ids)},
            )
            turn = list(sampled.token_ids)[: limit - len(ids)]
            ids, mask, turns = ids + turn, mask + [1] * len(turn), turns + 1
            logprobs += list(sampled.log_probs or [])[: len(turn)]
            text = decode(self.tokenizer, turn, special=self._markup)
            ended = bool(turn) and turn[-1] == self.tokenizer.eos_token_id
            if not ended and not any(stop in text for stop in stops):
                output = session.truncate("length")
                break
            output = await session.astep(text)
            markup = output.info["chat_markup"] if self._markup else ()
            seen = encode_observation(self.tokenizer, output.observation, markup)
            if not session.episode.over and len(ids) + len(seen) >= limit:
                output = session.truncate("length")
            elif not session.episode.over:
                ids, mask = ids + seen, mask + [0] * len(seen)
                logprobs += [0.0] * len(seen) if sampled.log_probs else []
        void = output.info["void"]
        return AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=ids,
            response_mask=[0] * len(mask) if void else mask,
            response_logprobs=logprobs or None,
            reward_score=output.reward,
            num_turns=2 * turns,
            metrics=AgentLoopMetrics(),
            extra_fields={
                "turn_scores": [],
                "tool_rewards": [],
                "reward_extra_info": {**output.info["metrics"], "void": float(void)},
            },
        )
