"""Choose the fastest way of sampling with a model that agrees with plain transformers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from research_agent.distributed import lost_or_out_of_memory
from research_agent.engines.recurrent_states import forget_states
from research_agent.engines.slot_attention import restore_attention
from research_agent.engines.transformers import TransformersEngine, Way
from research_agent.errors import ContextError, ModelError, ResearchAgentError
from research_agent.models.recurrent import recurrent_layers

if TYPE_CHECKING:
    from research_agent.renderer import Renderer


def proved_engine(
    model: Any,
    renderer: Renderer,
    max_slots: int,
    max_context: int | None,
    *,
    dtype: str | None = None,
    share: bool = False,
) -> TransformersEngine:
    """Make an engine that computes what plain transformers computes, in the fastest way that does.

    Args:
        model: the policy, of the transformers library.
        renderer: its tokenizer.
        max_slots: as for ``TransformersEngine``.
        max_context: as for ``TransformersEngine``.
        dtype: as for ``TransformersEngine``.
        share: as for ``TransformersEngine``.

    Returns:
        The engine, with nothing under way.

    Raises:
        ModelError: no way of running the model agrees with it.
        torch.OutOfMemoryError: the keys and values of all slots do not fit.
    """
    plain = model.config._attn_implementation
    causes: list[str] = []
    ways: tuple[Way, ...] = ("together", "tokens", "alone")
    for way in ways if recurrent_layers(model) else ("together", "alone"):
        try:
            engine = TransformersEngine(
                model,
                renderer,
                max_slots,
                max_context,
                dtype=dtype,
                share=share,
                way=way,
            )
            difference = engine.difference_to_plain(plain)
        except ContextError:
            raise
        except ResearchAgentError as error:
            difference = str(error)
        except (RuntimeError, TypeError, ValueError, IndexError,
                AttributeError, KeyError, AssertionError, StopIteration) as error:  # fmt: skip
            if lost_or_out_of_memory(error):
                raise
            difference = f"{type(error).__name__}: {error}"
        if not difference:
            if way == "alone":
                warnings.warn(
                    f"{type(model).__name__} is sampled one sequence at a time, as sequences"
                    f" together are wrong ({causes[0]}); --engine vllm is faster",
                    stacklevel=3,
                )
            return engine
        causes.append(difference)
        if share:
            restore_attention(model, plain)
            forget_states(model)
    raise ModelError(
        f"the transformers engine does not compute what {type(model).__name__} does. Sequences"
        f" together: {causes[0]}. One at a time: {causes[-1]}. Use --engine vllm"
    )
