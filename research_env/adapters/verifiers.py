"""verifiers, and so prime-rl: a taskset of the questions, and a harness that plays them.

verifiers names plug-ins by top-level modules; ``research_env_verifiers`` is this one:

.. code-block:: bash

    vf-eval research_env_verifiers -n 8 -r 4 -m MODEL --client.base-url http://localhost:8000/v1
        --env.taskset.args '{"dataset": "musique", "top_k": 3}' --no-push

The harness runs in the process of the environment. It asks the endpoint for one turn at a time and
stops at the protocol's terminators; with ``"protocol": "tool-calls"`` it sends the tools and takes
the endpoint's tool calls. verifiers keeps the tokens, and masks all that is not the model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from research_env.adapters import require
from research_env.adapters.chat import policy_text
from research_env.adapters.shared import shared_sessions
from research_env.errors import ConfigurationError
from research_env.sessions import Session
from research_env.tools.calls import BadCallError, parse_json

require("verifiers", ("0.3", "0.4"), "verifiers")

import openai  # noqa: E402
import verifiers.v1 as vf  # noqa: E402
from pydantic import Field  # noqa: E402
from verifiers.v1.runtimes import ProgramResult  # noqa: E402


class ResearchData(vf.TaskData):  # type: ignore[misc]
    """A task; ``args`` are the settings of its sessions."""

    question_id: str
    args: dict[str, Any] = Field(default_factory=dict)


class ResearchTask(vf.Task[ResearchData, vf.State]):  # type: ignore[misc]
    """Takes reward and metrics from the episode that the harness played."""

    @property
    def key(self) -> str:
        """The question's id."""
        return str(self.data.question_id)

    @vf.reward  # type: ignore[untyped-decorator]
    async def reward(self, trace: Any) -> float:
        """The environment's own reward."""
        return float(trace.info["research_env"]["reward"])

    @vf.metric  # type: ignore[untyped-decorator]
    async def metrics(self, trace: Any) -> dict[str, float]:
        """The environment's metrics; the keys are the same in every episode."""
        return dict(trace.info["research_env"]["metrics"])


class ResearchTasksetConfig(vf.TasksetConfig):  # type: ignore[misc]
    """Which environment, and in which order its questions come."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Settings of :class:`research_env.sessions.Sessions`, such as ``{"dataset": "musique"}``."""
    seed: int = 0
    """Draws the order of the questions."""


class ResearchTaskset(vf.Taskset[ResearchTask, ResearchTasksetConfig]):  # type: ignore[misc]
    """The environment's questions."""

    def load(self) -> Iterator[ResearchTask]:
        """Yield the tasks in the order of the seed.

        Raises:
            ConfigurationError: ``system_prompt`` is set, which would not be the paper's prompt.
        """
        if self.config.system_prompt is not None:
            raise ConfigurationError(
                f"system_prompt={str(self.config.system_prompt)!r} is not used: set a prompt of "
                "your own by --env.taskset.args '{\"template\": ...}'"
            )
        for row in shared_sessions(self.config.args).tasks(self.config.seed):
            data = ResearchData(
                id=row["id"],
                name=row["id"],
                prompt=row["messages"],
                question_id=row["id"],
                args=self.config.args,
            )
            yield ResearchTask(data, self.config.task)


class ResearchHarness(vf.Harness[vf.HarnessConfig]):  # type: ignore[misc]
    """Plays one episode against the endpoint that verifiers hands over."""

    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(  # noqa: PLR0917 (verifiers' signature)
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: ResearchData,
    ) -> ProgramResult:
        """Play to the end of the episode; a limit of verifiers truncates it, and it is scored.

        Raises:
            vf.TaskError: the search engine failed. verifiers does not score the rollout.
            openai.APIStatusError: the endpoint failed after retries; not scored either.
        """
        sessions = shared_sessions(data.args)
        session = sessions.open(data.question_id)
        try:
            await _play(session, ctx.model, endpoint, secret)
        except openai.APIStatusError:
            if trace.stop_condition is None:  # else a limit of verifiers has refused the turn
                raise
        finally:
            over = session.episode.over
            output = sessions.core.output(session.episode) if over else session.truncate("length")
            info = {key: output.info[key] for key in ("metrics", "stop_reason", "void")}
            trace.info["research_env"] = {"reward": session.total_reward(output), **info}
        if output.info["void"]:
            raise vf.TaskError(f"the search engine failed in the episode of {data.question_id!r}")
        return ProgramResult(exit_code=0, stdout="", stderr="")


async def _play(session: Session, model: str, endpoint: str, secret: str) -> None:
    """Let the endpoint take turns until the episode is over; a turn that is cut is the last."""
    protocol, tools = session.episode.protocol, session.info["tools"]
    messages: list[Any] = list(session.info["messages"])
    async with openai.AsyncOpenAI(
        base_url=endpoint, api_key=secret, max_retries=5, timeout=None
    ) as client:
        while True:
            reply = await client.chat.completions.create(
                model=model, messages=messages, tools=tools or openai.omit
            )
            message = reply.choices[0].message.model_dump(exclude_none=True)
            action = _unnamed(message) if protocol.tools else policy_text(protocol, message)
            output = await session.astep(action)
            if session.episode.over or reply.choices[0].finish_reason == "length":
                return
            if protocol.tools:
                messages += _answered(message, output.info["messages"])
            else:
                messages += [message, {"role": "user", "content": output.observation}]


def _unnamed(message: dict[str, Any]) -> dict[str, Any]:
    """The policy's message without the ids of its calls, which the environment then names.

    The environment refuses a call whose id was used before. Ids are the endpoint's, not the
    policy's, and that of verifiers' trainer begins again at ``call_0`` in each turn.
    """
    calls = message.get("tool_calls", ())
    return {**message, "tool_calls": [{**call, "id": ""} for call in calls]}


def _answered(message: dict[str, Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The policy's message and the results of its calls, as endpoints take them.

    verifiers takes a message that comes back unchanged for the turn that it sampled, so the results
    get the ids of the calls. Endpoints refuse empty and repeated ids in a turn: then the calls get
    those of the results. They also refuse arguments that are no JSON object, which become an empty
    one; the result says what was wrong.
    """
    calls = message["tool_calls"]
    ids = [call["id"] for call in calls]
    if "" in ids or len({*ids}) < len(ids):
        ids = [result["tool_call_id"] for result in results]
    for call, result, each in zip(calls, results, ids, strict=True):
        call["id"] = result["tool_call_id"] = each
        if "function" in call:
            call["function"]["arguments"] = _json_object(call["function"]["arguments"])
    return [message, *results]


def _json_object(text: str) -> str:
    try:
        return text if isinstance(parse_json(text), dict) else "{}"
    except BadCallError:
        return "{}"


class ResearchEnvConfig(vf.EnvConfig):  # type: ignore[misc]
    """One agent, in the process of the environment."""

    taskset: ResearchTasksetConfig = ResearchTasksetConfig()
    agent: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())


class ResearchEnv(vf.Env[ResearchEnvConfig]):  # type: ignore[misc]
    """One episode per task; sampling stops at the terminators of the task's protocol."""

    def __init__(self, config: ResearchEnvConfig) -> None:
        """Add the terminators to the agent's sampling."""
        sessions = shared_sessions(config.taskset.args)
        given = config.agent.sampling or vf.SamplingConfig()
        stops: dict[str, Any] = {}
        if not sessions.core.protocol.tools:  # the endpoint ends a turn of tool calls itself
            stops = {"stop": list(sessions.terminators), "include_stop_str_in_output": True}
        sampling = vf.SamplingConfig(**{**given.model_dump(exclude_unset=True), **stops})
        agent = config.agent.model_copy(update={"sampling": sampling})
        super().__init__(config.model_copy(update={"agent": agent}))

    async def run(self, task: ResearchTask, agents: Any) -> None:
        """Let the agent play."""
        await agents.agent.run(task)
