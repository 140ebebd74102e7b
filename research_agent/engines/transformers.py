"""Sampling with any causal language model of the ``transformers`` library.

Each slot keeps its keys and values across turns, so that no token is ever prefilled twice, and a
slot that begins as another one did copies them: a group's common prompt is prefilled once. One step
is one forward over a packed row of tokens: the last token of every turn under way, and all new
tokens of those that begin. So the linear layers see no padding; only the attention knows of slots.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from research_agent.engines.base import Completion, Finish, SamplingParams, make_completion
from research_agent.engines.checks import (
    WeightNames,
    not_finite,
    require_context,
    require_idle,
    require_no_turns,
    require_room,
    require_slot,
)
from research_agent.engines.recurrent_states import RecurrentStates, keep_states_by_slot
from research_agent.engines.slot_attention import (
    ACTIVE_CACHE,
    SLOT_ATTENTION,
    Chunk,
    SlotCache,
    restore_attention,
)
from research_agent.errors import ModelError
from research_agent.models.probe import engine_difference, plain_logits

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from research_agent.renderer import Renderer

Way = Literal["together", "tokens", "alone"]
"""How the model is run; see ``TransformersEngine``."""
_MAX_STEP_TOKENS = 16_384  # bounds the memory of one forward
_DECODE_ROWS = 64  # rows that attend together, as far as the longest of them reaches


class TransformersEngine:
    """An ``Engine`` over a ``transformers`` causal language model.

    Args:
        model: the policy. Its weights are copied, unless ``share``.
        renderer: its tokenizer.
        max_slots: how many trajectories may be held at once; slots are ``0 .. max_slots - 1``.
        max_context: tokens that a trajectory may have; the model's own limit by default.
        dtype: number format of the copied weights, such as bfloat16; the model's own by default.
        share: use the model object itself. Only where nobody else uses it, as when evaluating.
        way: how the model is run. "tokens" continues recurrent states token by token, for
            architectures that continue them in no other way (Mamba). "alone" forwards slots one
            after another, each with the transformers library's own cache: slow, and right for
            architectures whose attention cannot be replaced.

    Raises:
        ContextError: more context than the model has, or than it reads alike beside others.
        ModelError: the architecture's attention cannot be replaced, or has no known context.

    The draws of a trajectory are a function of its seed and of the position of the token only. The
    logits are those of a batch, and equal those of another batch up to floating-point rounding.
    """

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        max_slots: int,
        max_context: int | None = None,
        *,
        dtype: str | None = None,
        share: bool = False,
        way: Way = "together",
    ) -> None:
        self.max_context = require_context(model, max_context)
        self.max_slots = max_slots
        self.forwarded_tokens = 0  # since the start; tokens whose keys are copied do not count
        self._renderer = renderer
        self._model = (model if share else _copy(model, dtype)).eval()
        self._device = next(self._model.parameters()).device
        self._names = WeightNames(self._model)
        self._alone = way == "alone"
        self._caches: dict[int, tuple[str, Any]] = {}  # alone: of each slot, by argument name
        self._states: RecurrentStates | None = None
        if not self._alone:
            self._states = keep_states_by_slot(self._model, token_by_token=way == "tokens")
            try:
                self._model.set_attn_implementation(SLOT_ATTENTION)
                replaced = self._model.config._attn_implementation == SLOT_ATTENTION
            except (ValueError, AttributeError):
                replaced = False
            if not replaced:
                raise ModelError("its attention cannot be replaced; use --engine vllm")
        self._can_copy = not self._alone and self._states is None
        if self._can_copy:
            # A recurrent state cannot be taken back to an earlier token: such a model offers no
            # fork, and branches forward their tokens again.
            self.fork: Callable[[int, int, int], None] = self._fork
        keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}
        self._version = 0
        self._cache = SlotCache(max_slots, self.max_context)
        self._order = np.arange(max_slots)  # [rows] -> the slot whose cache the row holds
        self._cached = np.zeros(max_slots, dtype=np.int64)  # [slots] tokens in the cache
        self._written = np.zeros(max_slots, dtype=np.int64)  # [slots] tokens of this turn
        self._limit = np.zeros(max_slots, dtype=np.int64)  # [slots] of this turn
        self._seed = np.zeros(max_slots, dtype=np.uint64)
        self._temperature = np.ones(max_slots)
        self._last = np.full(max_slots, -1, dtype=np.int64)  # [slots] sampled, not forwarded yet
        self._stop_set = np.zeros(max_slots, dtype=np.int64)  # [slots] -> index of a stop set
        self._stop_sets: dict[tuple[str, ...], int] = {}
        vocabulary = max(len(renderer.tokenizer), model.get_output_embeddings().weight.shape[0])
        self._ends = np.zeros(vocabulary, dtype=np.bool_)
        self._ends[list(renderer.end_ids)] = True
        self._flags = np.zeros((0, vocabulary), dtype=np.bool_)  # [stop sets, vocabulary]
        self._tokens = np.zeros((max_slots, self.max_context), dtype=np.int64)  # this turn's tokens
        self._logprobs = np.zeros((max_slots, self.max_context), dtype=np.float32)
        self._params: dict[int, SamplingParams] = {}
        self._pending: dict[int, list[int]] = {}  # slots whose turn has not begun: new tokens
        self._prompts: dict[tuple[int, ...], int] = {}  # first tokens -> the slot that has them
        self._decoding = 0  # rows [0, decoding) have a turn under way

    @property
    def busy(self) -> int:
        """Number of slots with a turn under way."""
        return len(self._params)

    def submit(self, slot: int, tokens: Sequence[int], params: SamplingParams) -> None:
        """Append tokens to what the slot holds already, and sample a turn from there.

        Raises:
            ContextError: nothing to continue from, or no room left to sample a token.
            ValueError: no such slot, or one whose turn is under way.
        """
        require_slot(slot, self.max_slots)
        require_idle(slot, self._params)
        last = [int(self._last[slot])] if self._last[slot] >= 0 else []
        new = [*last, *tokens]
        length = int(self._cached[slot]) + len(new)
        require_room(slot, length, self.max_context)
        self._params[slot] = params
        self._pending[slot] = new
        self._last[slot] = -1
        self._tokens[slot, : params.resumed_tokens] = new[len(new) - params.resumed_tokens :]
        self._written[slot] = params.resumed_tokens
        self._limit[slot] = params.resumed_tokens + min(
            params.max_tokens, self.max_context - length
        )
        self._seed[slot] = np.uint64(params.seed % 2**64)
        self._temperature[slot] = params.temperature
        self._stop_set[slot] = self._stop_index(params.stop)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Sample one token in every busy slot; return the turns that this ends.

        Raises:
            NonFiniteError: the model's logits are not finite.
        """
        if not self._params:
            return []
        admitted = self._admit()
        slots = self._order[: self._decoding]
        logits = self._forward(slots, admitted)
        tokens, logprobs = self._sample(slots, logits)
        at = self._written[slots]
        self._tokens[slots, at] = tokens
        self._logprobs[slots, at] = logprobs
        self._written[slots] = at + 1
        self._last[slots] = tokens
        ends = self._ends[tokens]
        full = at + 1 >= self._limit[slots]
        flagged = self._flags[self._stop_set[slots], tokens]
        done: list[Completion] = []
        for row in np.flatnonzero(ends | full | flagged):
            slot = int(slots[row])
            finish_reason: Finish | None = "end" if ends[row] else None
            if finish_reason is None and flagged[row]:
                turn = self._tokens[slot, : at[row] + 1].tolist()
                if self._renderer.stops(turn, self._params[slot].stop):
                    finish_reason = "stop"
            if finish_reason is None and full[row]:
                finish_reason = "length"
            if finish_reason is not None:
                done.append(self._complete(slot, finish_reason))
        if done:
            self._close_gaps()
        return done

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Forget what the slot holds, so that another trajectory can use it."""
        decoding = slot in self._params and slot not in self._pending
        self._params.pop(slot, None)
        self._pending.pop(slot, None)
        if decoding:
            self._close_gaps()
        self._caches.pop(slot, None)
        if self._states is not None:
            self._states.forget(slot)
        self._prompts = {prompt: held for prompt, held in self._prompts.items() if held != slot}
        self._cached[slot] = 0
        self._last[slot] = -1

    @torch.inference_mode()
    def _fork(self, source: int, target: int, length: int) -> None:
        """Let a slot hold the first tokens that another one holds: a copy of keys and values.

        Args:
            source: the slot that holds them.
            target: another slot, with no turn under way; what it held is forgotten.
            length: how many tokens.

        Raises:
            ValueError: the target is busy or the source itself, or holds fewer tokens.
        """
        if target in self._params or target == source:
            raise ValueError(f"slot {target} is busy or the source; fork into another slot")
        if length > self._cached[source]:
            held = int(self._cached[source])
            raise ValueError(f"slot {source} holds {held} tokens, not {length}")
        self.release(target)
        self._copy_held(source, target, length)

    def interrupt(self) -> list[Completion]:
        """End the turns under way where they are, and forget what their slots hold."""
        turns = [self._complete(slot, "interrupted") for slot in sorted(self._params)]
        self._pending.clear()
        self._decoding = 0
        for turn in turns:
            self.release(turn.slot)
        return turns

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy new weights in by name; every slot is forgotten.

        Raises:
            ModelError: a name or shape that the model does not have, or a weight left out.
            ValueError: a turn is under way.
        """
        require_no_turns(self.busy)
        own = self._model.state_dict(keep_vars=True)
        given = set()
        with torch.no_grad():
            for name, new in weights:
                self._names.require(name, new)
                own[name].copy_(new)
                given.add(name)
        self._names.require_all(given)
        self._version = version
        for slot in range(self.max_slots):
            self.release(slot)

    def difference_to_plain(self, attention: str | None) -> str:
        """Say where this engine differs from its own model run plainly, on two short trajectories.

        Args:
            attention: what the model's attention is when nobody has replaced it.

        Returns:
            The difference in words; empty where both are the same but for rounding.
        """
        ours = self._model.config._attn_implementation

        def plain(tokens: list[int]) -> Tensor:
            restore_attention(self._model, attention)
            return plain_logits(self._model, tokens)

        try:
            words = len(self._model.get_output_embeddings().weight)
            return engine_difference(self, plain, words)
        finally:
            for slot in range(min(2, self.max_slots)):
                self.release(slot)
            restore_attention(self._model, ours)
            self.forwarded_tokens = 0

    def _stop_index(self, stop: tuple[str, ...]) -> int:
        if stop not in self._stop_sets:
            flags = np.zeros((1, self._flags.shape[1]), dtype=np.bool_)
            known = self._renderer.stop_flags(stop)
            flags[0, : len(known)] = known
            self._stop_sets[stop] = len(self._flags)
            self._flags = np.concatenate([self._flags, flags])
        return self._stop_sets[stop]

    def _complete(self, slot: int, finish_reason: Finish) -> Completion:
        new = slice(self._params.pop(slot).resumed_tokens, int(self._written[slot]))
        tokens, logprobs = self._tokens[slot, new].tolist(), self._logprobs[slot, new].tolist()
        return make_completion(
            self._renderer,
            slot,
            tokens,
            logprobs,
            finish_reason=finish_reason,
            version=self._version,
        )

    def _admit(self) -> list[int]:
        """Begin as many pending turns as one forward may hold.

        Turns with about as many new tokens make a bucket, in which the longest come first: then
        neighboring rows are of like length, and the short ones at the end fill the gaps that
        finished turns leave.

        Returns:
            How many turns are in each bucket.
        """
        buckets: dict[int, list[int]] = {}
        room = _MAX_STEP_TOKENS
        for slot in self._pending:
            if self._can_copy and not self._cached[slot] and not self._copy_prompt(slot):
                continue
            count = len(self._pending[slot])
            room -= count
            if room < 0 and buckets:
                break
            buckets.setdefault(count.bit_length(), []).append(slot)
        admitted = [
            sorted(bucket, key=lambda s: -self._cached[s] - len(self._pending[s]))
            for _, bucket in sorted(buckets.items())
        ]
        if admitted:
            slots = np.array([slot for bucket in admitted for slot in bucket])
            going = self._order[: self._decoding]
            rest = self._order[self._decoding :]
            self._arrange(np.concatenate([going, slots, rest[~np.isin(rest, slots)]]))
            self._decoding += len(slots)
        return [len(bucket) for bucket in admitted]

    def _copy_prompt(self, slot: int) -> bool:
        """Copy the prompt of an empty slot from one that has it already.

        Returns:
            Whether the slot can begin; it waits a step where the other one begins in this one.
        """
        prompt = self._pending[slot]
        holder = self._prompts.setdefault(tuple(prompt), slot)
        if holder == slot:
            return True
        if not self._cached[holder]:
            return False
        self._copy_held(holder, slot, len(prompt) - 1)  # the last one's logits are needed
        self._pending[slot] = prompt[-1:]
        return True

    def _copy_held(self, source: int, target: int, length: int) -> None:
        """Copy keys and values of the first tokens that a slot holds."""
        rows = np.argsort(self._order)
        self._cache.move(self._tensor(rows[[target]]), self._tensor(rows[[source]]), length)
        self._cached[target] = length

    def _close_gaps(self) -> None:
        """Move the last rows with a turn under way to the places of those whose turn is over."""
        order = self._order.copy()
        going = np.array([slot in self._params for slot in order[: self._decoding].tolist()])
        count = int(going.sum())
        gaps = np.flatnonzero(~going[:count])
        last = count + np.flatnonzero(going[count:])
        order[gaps], order[last] = order[last], order[gaps]
        self._arrange(order)
        self._decoding = count

    def _arrange(self, order: NDArray[np.int64]) -> None:
        """Move the caches so that row i is that of slot order[i]."""
        moved = np.flatnonzero((order != self._order) & (self._cached[order] > 0))
        if len(moved):
            source = np.argsort(self._order)[order[moved]]
            reach = int(self._cached[order[moved]].max())
            self._cache.move(self._tensor(moved), self._tensor(source), reach)
        self._order = order

    def _forward(self, slots: NDArray[np.int64], admitted: list[int]) -> Tensor:
        """Forward every new token of the slots; float32 logits [slots, vocabulary] of the last."""
        if self._alone:
            return torch.stack([self._forward_alone(slot) for slot in slots.tolist()])
        going = len(slots) - sum(admitted)
        counts = np.ones(len(slots), dtype=np.int64)
        tokens: list[int] = self._last[slots[:going]].tolist()
        for row, slot in enumerate(slots[going:].tolist(), start=going):
            new = self._pending.pop(slot)
            counts[row] = len(new)
            tokens += new
        before = self._cached[slots]
        ends = np.cumsum(counts)
        rows = np.repeat(np.arange(len(slots)), counts)
        places = self._tensor(before[rows] + np.arange(len(tokens)) - (ends - counts)[rows])
        edges = [*range(0, going, _DECODE_ROWS), *(going + np.cumsum([0, *admitted])).tolist()]
        self._cache.rows, self._cache.places = self._tensor(rows), places
        self._cache.chunks = tuple(
            self._chunk(first, counts[first:last], before[first:last], int(ends[first]))
            for first, last in itertools.pairwise(edges)
        )
        self.forwarded_tokens += len(tokens)
        self._cached[slots] = before + counts
        if self._states is not None:
            self._states.slots, self._states.ends = slots.tolist(), ends.tolist()
        active = ACTIVE_CACHE.set(self._cache)
        try:
            logits: Tensor = self._model(
                input_ids=self._tensor(np.array(tokens))[None],
                position_ids=places[None],
                use_cache=False,
                logits_to_keep=self._tensor(ends - 1),
            ).logits[0]
        finally:
            ACTIVE_CACHE.reset(active)
            if self._states is not None:
                self._states.slots = ()
        return logits.float()

    def _forward_alone(self, slot: int) -> Tensor:
        """Forward the new tokens of a slot with its own cache; float32 logits of the last one."""
        new = self._pending.pop(slot, None) or [int(self._last[slot])]
        self.forwarded_tokens += len(new)
        self._cached[slot] += len(new)
        name, cache = self._caches.get(slot, ("past_key_values", None))
        given = {} if cache is None else {name: cache}
        ids = self._tensor(np.array(new))[None]
        output = self._model(input_ids=ids, use_cache=True, **given, **self._last_only)
        kept = ((n, getattr(output, n, None)) for n in ("past_key_values", "cache_params"))
        self._caches[slot] = next((n, held) for n, held in kept if held is not None)
        logits: Tensor = output.logits[0, -1]
        return logits.float()

    def _chunk(
        self, first: int, counts: NDArray[np.int64], before: NDArray[np.int64], first_end: int
    ) -> Chunk:
        """What the attention must know of rows that follow each other.

        Args:
            first: the first row.
            counts: new tokens of each row. Shape [rows].
            before: cached tokens of each. Shape [rows].
            first_end: where the first row's tokens end in the packed row.
        """
        width, reach = int(counts.max()), int((before + counts).max())
        begins = np.cumsum(counts) - counts
        offsets = np.arange(width)
        hidden = np.arange(reach) > (before[:, None] + offsets)[..., None]  # [rows, width, reach]
        mask = torch.zeros(hidden.shape, device=self._device)
        mask.masked_fill_(self._tensor(hidden), -torch.inf)
        pad = unpad = None
        if width > 1:
            pad = self._tensor(np.minimum(begins[:, None] + offsets, counts.sum() - 1))
            unpad = self._tensor(np.flatnonzero(offsets < counts[:, None]))
        start = first_end - int(counts[0])
        return Chunk(
            first=first,
            count=len(counts),
            start=start,
            stop=start + int(counts.sum()),
            reach=reach,
            mask=mask[:, None],
            pad=pad,
            unpad=unpad,
        )

    def _sample(
        self, slots: NDArray[np.int64], logits: Tensor
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Draw a token for each slot by the inverse of the cumulative distribution."""
        temperature = self._temperature[slots]
        greedy = temperature == 0
        if (temperature != 1).any():
            logits = logits / self._tensor(np.where(greedy, 1, temperature)).float()[:, None]
        logprobs = torch.log_softmax(logits, dim=-1)
        if greedy.all():
            drawn = logits.argmax(dim=-1)
        else:
            mass = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
            uniform = self._tensor(uniforms(self._seed[slots], self._cached[slots]))
            drawn = torch.searchsorted(mass, (uniform[:, None] * mass[:, -1:]), right=True)[:, 0]
            drawn = drawn.clamp(max=logits.shape[-1] - 1)
            if greedy.any():
                drawn = torch.where(self._tensor(greedy), logits.argmax(dim=-1), drawn)
        chosen = logprobs.gather(1, drawn[:, None])[:, 0].cpu().numpy()
        if not np.isfinite(chosen).all():
            self._cache.layers.clear()  # a NaN shows through a mask
            raise not_finite(self._version)
        return drawn.cpu().numpy(), chosen

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _copy(model: Any, dtype: str | None) -> Any:
    """Copy a model, its weights in another number format if one is named.

    Buffers keep theirs: the frequencies of rotary positions are float32 in every model.
    """
    copied = copy.deepcopy(model)
    if dtype is not None:
        for weight in copied.parameters():
            weight.data = weight.data.to(getattr(torch, dtype))
    return copied


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) that depend on seed and position only. Shapes [n], [n] -> [n].

    Two rounds of the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
    number generators", 2014), over the seed and then over the position.
    """
    with np.errstate(over="ignore"):
        mixed = _splitmix(_splitmix(seeds) + positions.astype(np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
