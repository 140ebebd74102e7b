"""The environment for one episode at a time."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import gymnasium as gym

from research_env.core import (
    EnvSettings,
    StepOutput,
    closing_line,
    make_core,
    reset_seed,
    resolve_search,
)
from research_env.episode import Action, Episode, TruncationReason, advance, truncate
from research_env.errors import ClosedError, ConfigurationError, EpisodeError, UnknownNameError
from research_env.fingerprint import environment_fingerprints
from research_env.info import SHOWS
from research_env.spaces import UnicodeText
from research_env.system.terminal import show


class SearchQAEnv(gym.Env[str, str]):
    r"""Answer a question that needs several searches.

    ## Actions
    A text: what the policy writes up to a terminator (``env.action_space.terminators``, such as
    ``</search>``) or to the end of its turn. Any string is valid; what follows the first terminator
    is ignored. A protocol with tool calls also takes a structured
    :class:`~research_env.tools.ToolTurn`, or an assistant message in the form of OpenAI's API.

    ## Observations
    The text to append: after ``reset`` the prompt, after a search the passages between the
    protocol's marks, at the end nothing.

    ## Reward
    Zero until the episode ends, then the reward function's value for what the policy wrote.
    Retrieved text has no influence on it. With ``turn_reward`` every step has a reward.

    ## End
    ``terminated`` after an answer or any other text that is no search; but search-r1 answers
    invalid text with a hint, and tool calls with errors get these as their results. ``truncated``
    when a limit is passed or the search engine failed. In the latter case ``info["void"]`` is True,
    and nothing may be learned from the episode. A trainer whose budget of tokens is spent calls
    ``truncate("length")``, which ends the episode with its reward and metrics: what the policy
    wrote counts.

    ## Info
    Always the same keys:

    - ``question_id``, ``question`` and, after ``reset``, ``messages`` (the prompt as a chat);
    - with tool calls ``tools`` (JSON Schemas) after ``reset``, and after a turn ``messages`` (a
      result for each call) and ``chat_markup`` (the chat tokens of the observation);
    - ``strata``: the question's hops and type, the groups by which evaluations report means;
    - after a search ``query``, ``passage_ids``, ``passage_titles`` and ``passage_scores``;
    - ``state_key``: equal where two episodes of a question have found the same passages;
    - at the end ``prediction``, ``answers``, ``supporting_ids`` (gold passages), ``metrics``,
      ``stop_reason`` and ``void``.

    ``metrics`` holds ``em, f1, cem, format, searches, support_recall``, and the components of a sum
    of rewards as ``reward/NAME``.

    ## Arguments
    All by keyword. Strings and numbers suffice, so that ``env.spec.to_json()`` works; programs may
    also give objects.

    - ``dataset``: miniworld (default), musique, hotpotqa, 2wiki, bamboogle, nq, triviaqa, popqa,
      r1-searcher, custom, a mixture such as ``"musique:2+hotpotqa:1"``; or a
      :class:`~research_env.datasets.base.Dataset`.
    - ``split``: train (default), dev, ...; ``hops``: only questions of so many hops.
    - ``questions``, ``corpus``: paths, for a custom data set.
    - ``world_seed``, ``difficulty``: for MiniWorld. Another seed is another world; the difficulty
      is 0 (default) to 5, see `research_env.datasets.miniworld_hard`.
    - ``grades``, ``grade``: a file of ``research-agent grade``, and which of its questions to ask:
      ``"hard"``, or a mixture such as ``"medium:1+hard:2"``.
    - ``retriever``: a URL such as ``"embedded:DIR"``, None (the data set's own corpus), or a
      :class:`~research_env.retrieval.base.Retriever`. ``top_k``: passages that a search returns.
    - ``protocol``: research (default), r1-searcher, search-r1, tool-calls, recall;
      ``"module:NAME"`` for your own, or a :class:`~research_env.protocol.Protocol`. It sets the
      defaults of ``top_k``, ``reward``, ``max_searches`` and ``max_turns``.
    - ``reward``: a name, ``"module:function"``, a sum of them such as
      ``"research+0.1*support_recall-0.02*searches"``, whose components are among the metrics, or a
      function of an :class:`~research_env.episode.Episode`.
    - ``turn_reward``: None (default), or rewards of single turns, written in the same way, such as
      ``"0.2*new_support-0.02*searches"`` (`research_env.turn_rewards`). Their sums over the episode
      are among the metrics as ``turn_reward/NAME``.
    - ``template``: base (default), instruct, question; or your own: a text that contains
      ``{question}``, a file of such a text (.txt, .md), or a file of chat messages (.jsonl, .yaml).
    - ``tools``: with tool calls, what may be called: ``"search"`` (default), ``"search,open"``,
      and ``"module:NAME"`` for your own (`research_env.tools.tool`).
    - ``tool_format``: how the policy's model writes calls: hermes (default), qwen3.5,
      qwen3.5-nothink, llama3, harmony (`research_env.tools.FORMATS`).
    - ``max_searches``, ``max_turns``: asking for more ends the episode. With tool calls each call
      that is run counts as a search.
    - ``max_passage_chars``: the most characters of a passage that an observation shows (10,000 by
      default); a longer one is shortened to whole sentences, and ``[…]`` stands at its end.
    - ``metric_language``: the language by whose rules answers are compared: en, zh, ja or ko
      (`metrics.LANGUAGES`). None: the data set's, or the question's field ``metric_language``, or
      en.
    - ``render_mode``: None, ansi, human.

    ## Reset
    ``seed`` draws the order of the questions; ``reset()`` goes through it. ``options`` may be
    ``{"episode": n}``, the n-th of that order (each ``num_tasks`` are one pass over all questions),
    or ``{"question_id": id}``.

    ## Versions
    - v0: first release.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["ansi", "human"],
        "render_fps": 4,
        "shows": SHOWS,
    }

    def __init__(self, *, render_mode: str | None = None, **settings: Unpack[EnvSettings]) -> None:
        """Make an environment; see the class for the arguments.

        Raises:
            ResearchEnvError: a setting that cannot be used; the message says which and what to do.
        """
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UnknownNameError("render mode", render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self._core = make_core(**settings)
        self._episode: Episode | None = None
        self._reward = 0.0  # what the last step returned
        self._next = 0
        self._closed = False
        self.action_space = self._core.action_space()
        self.observation_space = UnicodeText()

    @property
    def num_tasks(self) -> int:
        """How many questions there are: episodes 0 to ``num_tasks - 1`` ask each once."""
        return len(self._core.questions)

    @property
    def episode(self) -> Episode | None:
        """The episode as it stands; None before the first reset."""
        return self._episode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode; see the class for ``seed`` and ``options``.

        Raises:
            ConfigurationError: an unknown option, no such episode or question, or a seed that is
                not an integer from 0 on.
        """
        seed = reset_seed(self, seed)
        # Bad options change nothing: the order is that of the new seed, which is not set yet.
        order, following = (self.np_random_seed, self._next) if seed is None else (seed, 0)
        match options or {}:
            case {"question_id": str(question_id), **rest} if not rest:
                index = self._core.find_question(question_id)
            case {"episode": number, **rest} if not rest:
                index = self._core.draw_question(order, number)
                following = int(number) + 1  # a small NumPy integer overflows
            case {**rest} if not rest:
                index = self._core.draw_question(order, following)
                following += 1
            case other:
                raise ConfigurationError(
                    f"reset takes one of the options 'episode' (a number) and 'question_id' "
                    f"(a string), not {other}"
                )
        super().reset(seed=seed)
        self._next = following
        self._episode, observation, info = self._core.start(index)
        if self.render_mode == "human":
            show(observation)
        return observation, info

    def step(self, action: Action) -> StepOutput:
        """Take what the policy wrote; returns (observation, reward, terminated, truncated, info).

        Raises:
            ActionError: the action is of another type.
            EpisodeError: before ``reset``, or after the end.
            ClosedError: a search after ``close``.
        """
        if self._episode is None:
            raise EpisodeError("there is no episode yet; call reset first")
        episode = advance(self._episode, action)
        if episode.pending is not None:
            if self._closed:
                raise ClosedError
            found = self._core.search(episode.pending_requests)
            episode = resolve_search(episode, *found)
        output = self._core.output(episode)
        self._episode, self._reward = episode, output.reward
        if self.render_mode == "human":
            closing = closing_line(episode, output.reward)
            show(episode.turns[-1].action + output.observation + closing)
        return output

    def truncate(self, reason: TruncationReason = "length") -> StepOutput:
        """End the episode from outside, because its budget of tokens is spent.

        Reach it through wrappers by ``env.get_wrapper_attr("truncate")``.

        Args:
            reason: becomes ``info["stop_reason"]``.

        Returns:
            What ``step`` returns at the end: reward and metrics of all that the policy wrote.

        Raises:
            EpisodeError: before ``reset``, or after the end.
        """
        if self._episode is None:
            raise EpisodeError("there is no episode yet; call reset first")
        episode = truncate(self._episode, reason)
        output = self._core.output(episode)
        self._episode, self._reward = episode, output.reward
        if self.render_mode == "human":
            show(closing_line(episode, output.reward))
        return output

    def fingerprints(self) -> dict[str, str]:
        """What results depend on besides the policy: fingerprints of questions, index, prompt."""
        return environment_fingerprints(self._core)

    def render(self) -> str | None:
        """The transcript so far in mode ``ansi``; mode ``human`` prints it as it grows."""
        if self.render_mode != "ansi" or self._episode is None:
            return "" if self.render_mode == "ansi" else None
        return self._core.transcript(self._episode, self._reward)

    def close(self) -> None:
        """Release the search engine; calling it twice is harmless."""
        self._closed = True
        self._core.close()
