"""TRL: ``GRPOTrainer`` over shared sessions, by ``rollout_func`` or by ``environment_factory``.

:class:`Rollouts` plays whole episodes in the protocol's own form: tags, exact tokens, masked
observations, batched searches. :class:`Tools` offers the search as a tool of TRL's own tool loop.

Example:
    .. code-block:: python

        rollouts = Rollouts(Sessions(dataset="miniworld", template="question"))
        trainer = GRPOTrainer(
            model,
            args=GRPOConfig(max_completion_length=300),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rollouts.rows()),
            rollout_func=rollouts,
            reward_funcs=rollouts.reward,
        )
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

from research_env.adapters import require
from research_env.adapters.chat import policy_text
from research_env.adapters.tokens import TokenEpisode
from research_env.adapters.trl_sampling import Sampled, generate_turns
from research_env.core import StepOutput
from research_env.errors import ConfigurationError, EpisodeError, UnknownTaskError
from research_env.markup import defuse
from research_env.sessions import Session, Sessions

require("trl", "1.16", "trl")

Generate = Callable[[Any, list[list[int]], list[int], tuple[str, ...]], Sampled]


class Rollouts:
    """The ``rollout_func`` of a ``GRPOTrainer``.

    A turn ends at a terminator or an end token. One that ``max_completion_length`` cuts is the last
    of its episode, and is scored too. A void episode has the reward None, so TRL leaves it out.
    """

    def __init__(
        self,
        sessions: Sessions,
        *,
        chat: bool = False,
        seed: int = 0,
        generate: Generate = generate_turns,
    ) -> None:
        """Read the tasks.

        Args:
            sessions: tasks, rules, engine and reward.
            chat: whether prompts are chat messages, which the tokenizer's chat template renders.
            seed: draws the order of the rows.
            generate: samples one turn per sequence, with arguments and result of
                :func:`~research_env.adapters.trl_sampling.generate_turns`, which is the default
                and cannot be used with vLLM.
        """
        self._sessions = sessions
        self._chat = chat
        self._tools = sessions.core.tool_schemas() if chat else []
        self._generate = generate
        self._rows: dict[str, dict[str, Any]] = {}
        for task in sessions.tasks(seed):
            prompt = task["messages"] if chat else task["prompt"]
            row = {"prompt": prompt, "question_id": task["id"]}
            self._rows.setdefault(_key(prompt), row)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of ``train_dataset``: ``prompt`` and ``question_id``.

        TRL passes the prompt alone, so of tasks with equal prompts only the first is a row.
        """
        return list(self._rows.values())

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """Play one episode per prompt; TRL calls this.

        Returns:
            Per prompt ``prompt_ids``, ``completion_ids``, ``logprobs`` (0 for observations; None
            if they are not known), ``env_mask`` (1: the policy's token, 0: an observation's), and
            ``env_reward``, ``env_metrics``, ``env_void`` for reward functions.

        Raises:
            UnknownTaskError: a prompt that is not in :meth:`rows`.
            ConfigurationError: a setting of the trainer that would play episodes differently.
        """
        self._check(trainer)
        prompt_ids = [_encode_prompt(trainer, prompt, self._tools) for prompt in prompts]
        budget, ends = trainer.max_completion_length, trainer.eos_token_ids
        episodes = [
            TokenEpisode(self._open(prompt), trainer._tokenizer, budget, ends, self._chat)
            for prompt in prompts
        ]
        while live := [i for i, each in enumerate(episodes) if each.end is None]:
            turns, scores = self._generate(
                trainer,
                [prompt_ids[i] + episodes[i].ids for i in live],
                [episodes[i].room for i in live],
                self._sessions.terminators,
            )
            acting: list[tuple[TokenEpisode, str]] = []
            for place, (i, turn) in enumerate(zip(live, turns, strict=True)):
                text = episodes[i].add_turn(turn, None if scores is None else scores[place])
                if text is not None:
                    acting.append((episodes[i], text))
            outputs = _step_all([(each.session, text) for each, text in acting])
            for (each, _), output in zip(acting, outputs, strict=True):
                each.add_output(output)
        finals = [(each.session, each.end) for each in episodes if each.end is not None]
        logprobs = [each.logprobs for each in episodes]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [each.ids for each in episodes],
            "logprobs": None if None in logprobs else logprobs,
            "env_mask": [each.mask for each in episodes],
            "env_reward": [
                None if end.info["void"] else session.total_reward(end) for session, end in finals
            ],
            "env_metrics": [end.info["metrics"] for _, end in finals],
            "env_void": [end.info["void"] for _, end in finals],
        }

    @staticmethod
    def reward(
        env_reward: list[float | None],
        env_metrics: list[dict[str, float]],
        env_void: list[bool],
        log_metric: Callable[[str, float], None] | None = None,
        **_: object,
    ) -> list[float | None]:
        """The reward function for ``reward_funcs``: the environment's own reward.

        It logs each metric's mean as ``env/NAME``, void episodes left out.
        """
        _log(env_metrics, env_void, log_metric)
        return env_reward

    def _open(self, prompt: Any) -> Session:
        row = self._rows.get(_key(prompt))
        if row is None:
            raise UnknownTaskError(
                f"no task has the prompt {prompt!r:.200}; make train_dataset of Rollouts.rows()"
            )
        return self._sessions.open(row["question_id"])

    def _check(self, trainer: Any) -> None:
        if trainer.mask_truncated_completions:
            raise ConfigurationError(
                "mask_truncated_completions=True would leave out every answer that ends at a "
                "terminator; set it to False"
            )
        if trainer.use_vllm and self._generate is generate_turns:
            raise ConfigurationError(
                "with use_vllm=True give Rollouts a generate= function of your own; the default "
                "one calls the model"
            )


class Tools:
    """The ``environment_factory`` of a ``GRPOTrainer``: ``search`` is a tool.

    The last message answers, in the form of the protocol (``<answer>...</answer>``). Unlike in
    :class:`Rollouts`, the chat template frames observations, and TRL runs tools one by one, so
    searches are not batched.
    """

    def __init__(self, sessions: Sessions, *, seed: int = 0) -> None:
        """Take the sessions.

        Args:
            sessions: tasks, rules, engine and reward. ``template="question"`` is best: the papers'
                prompts ask for tags, not for tools.
            seed: draws the order of the rows.
        """
        self._sessions = sessions
        self._seed = seed

    def rows(self) -> list[dict[str, Any]]:
        """The rows of ``train_dataset``: ``prompt`` as messages, and ``question_id``."""
        tasks = self._sessions.tasks(self._seed)
        return [{"prompt": task["messages"], "question_id": task["id"]} for task in tasks]

    def __call__(self) -> SearchTool:
        """An environment; TRL calls this, and uses it again after ``reset``."""
        return SearchTool(self._sessions)

    @staticmethod
    def reward(
        environments: Sequence[SearchTool],
        completions: Sequence[Sequence[Mapping[str, Any]]],
        log_metric: Callable[[str, float], None] | None = None,
        **_: object,
    ) -> list[float | None]:
        """The reward function for ``reward_funcs``: takes the last messages as the answers.

        It logs each metric's mean as ``env/NAME``. A void episode gets None: TRL leaves it out.

        Raises:
            Exception: a bug that a search raised; TRL has shown it to the policy as a result.
        """
        pairs = zip(environments, completions, strict=True)
        ends = [environment._end(messages) for environment, messages in pairs]
        metrics = [end.info["metrics"] for end in ends]
        _log(metrics, [end.info["void"] for end in ends], log_metric)
        return [None if end.info["void"] else end.reward for end in ends]


class SearchTool:
    """One rollout of TRL's tool loop; TRL offers each public method but ``reset`` as a tool."""

    def __init__(self, sessions: Sessions) -> None:
        """Take the sessions; ``reset`` opens an episode."""
        self._sessions = sessions
        self._session: Session | None = None
        self._failure: Exception | None = None

    def reset(self, question_id: str, **_: object) -> None:
        """Open the episode of a row.

        Args:
            question_id: the task.

        Raises:
            UnknownTaskError: no task has this id.
        """
        self._session = self._sessions.open(question_id)
        self._failure = None

    def search(self, query: str) -> str:
        """Search for passages.

        Args:
            query: What to look for.

        Returns:
            The passages found.
        """
        session = self._opened()
        if not isinstance(query, str):
            raise TypeError(f"query is text, not {type(query).__name__}")
        if session.episode.over:
            return "The episode is over; no more searches are possible."
        tag = session.episode.protocol.query
        # A tag in the query would be read as one of the turn, such as an answer.
        try:
            return session.step(f"{tag.open}{defuse(query)}{tag.close}").observation
        except Exception as error:  # TRL makes it a result of the tool, so the reward raises it
            self._failure = error
            raise

    def _end(self, messages: Sequence[Mapping[str, Any]]) -> StepOutput:
        """End the episode with the last message as its answer.

        ``search`` gets the query alone, so the thoughts before the calls are put in front of the
        turns here: the reward reads them for the format.
        """
        if self._failure is not None:
            raise self._failure
        session, thoughts = self._opened(), list[str]()
        for message in messages:
            if message["role"] == "assistant":
                calls = [call["function"] for call in message.get("tool_calls") or ()]
                searches = [c for c in calls if c["name"] == "search" and _is_query(c["arguments"])]
                if searches:
                    thoughts += [self._text(message), *[""] * (len(searches) - 1)]
        episode = session.episode
        pairs = zip(episode.turns, chain(thoughts, repeat("")), strict=False)
        turns = tuple(replace(turn, action=thought + turn.action) for turn, thought in pairs)
        session.episode = replace(episode, turns=turns)
        last = messages[-1]
        if not session.episode.over and last["role"] == "assistant" and not last.get("tool_calls"):
            session.step(self._text(last))
        over = session.episode.over
        end = self._sessions.core.output(session.episode) if over else session.truncate("length")
        return end._replace(reward=session.total_reward(end))

    def _text(self, message: Mapping[str, Any]) -> str:
        return policy_text(self._sessions.core.protocol, message)

    def _opened(self) -> Session:
        if self._session is None:
            raise EpisodeError("call reset before search")
        return self._session


def _step_all(jobs: Sequence[tuple[Session, str]]) -> list[StepOutput]:
    """Step all at once, so that their searches share calls of the engine."""

    async def together() -> list[StepOutput]:
        return list(await asyncio.gather(*(session.astep(text) for session, text in jobs)))

    # In a thread of its own: the caller may run in an event loop already, as in a notebook.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(together())).result()


def _encode_prompt(trainer: Any, prompt: Any, tools: Sequence[Mapping[str, Any]]) -> list[int]:
    """The tokens that TRL itself would make of a text or of chat messages."""
    tokenizer = trainer._tokenizer
    if isinstance(prompt, str):
        plain: list[int] = tokenizer(prompt)["input_ids"]
        return plain
    begun = prompt[-1]["role"] == "assistant"
    ids: list[int] = tokenizer.apply_chat_template(
        prompt,
        tools=list(tools) or None,
        tokenize=True,
        return_dict=False,
        add_generation_prompt=not begun,
        continue_final_message=begun,
        chat_template=trainer.chat_template,
        **trainer.chat_template_kwargs,
    )
    return ids


def _key(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return json.dumps([[message["role"], message["content"]] for message in prompt])


def _is_query(arguments: Any) -> bool:
    """Whether `SearchTool.search` takes these arguments; a call with others reaches no turn."""
    return (
        isinstance(arguments, Mapping)
        and arguments.keys() == {"query"}
        and isinstance(arguments["query"], str)
    )


def _log(
    metrics: Sequence[Mapping[str, float]],
    void: Sequence[bool],
    log_metric: Callable[[str, float], None] | None,
) -> None:
    kept = [each for each, is_void in zip(metrics, void, strict=True) if not is_void]
    if log_metric and kept:
        for name in kept[0]:
            log_metric(f"env/{name}", sum(each[name] for each in kept) / len(kept))
    if log_metric and void:
        log_metric("env/void", sum(void) / len(void))
