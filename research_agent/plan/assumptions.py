"""What a plan assumes and prints. None of it was measured on such machines."""

from __future__ import annotations

EPISODE_TOKENS = 1_300
"""Mean tokens per episode: the mean of R1-Searcher's recorded trajectories."""
ACTION_SHARE = 0.3
"""Fraction of an episode's tokens that the policy samples."""
LONGEST = 6.0
"""Longest episode of a step over the mean episode, in tokens; prompt and response limits hold."""
CALLS = 3
"""Turns per episode that wait for the environment."""
CALL_SECONDS = 0.5
"""Seconds that the environment takes per turn."""

LEARN_FLOPS = 0.3
"""Fraction of the peak FLOP/s that forward and backward passes reach."""
SAMPLE_BANDWIDTH = 0.6
"""Fraction of the memory bandwidth that decoding reaches."""
DECODE_SECONDS = 0.006
"""Seconds per decoding step of vLLM for scheduling and launches, besides reading memory."""
TRANSFORMERS_SECONDS = 0.03
"""The same for the transformers engine, which has no CUDA graphs."""
TENSOR_PARALLEL_SECONDS = 20e-6
"""Seconds per all-reduce between the GPUs of a sampler; there are two per layer."""
LINK_SHARE = 0.6
"""Fraction of a link's peak that collectives reach."""
TRANSFER = 30e9
"""Bytes per second of weights from the learner's GPUs to the samplers'."""
DISK = 2e9
"""Bytes per second to and from the folder of the run."""
HOST_LINK = 25e9
"""Bytes per second between a GPU and its host."""
HOST_BANDWIDTH = 200e9
"""Bytes per second of a host's memory, for all its ranks together."""
GATHER_SECONDS = 3e-4
"""Seconds per episode of a step, to give its tokens to all ranks and make tensors of them."""

CUDA_BYTES = 4e9
"""Bytes per GPU for CUDA, NCCL and fragmentation in the learner's process."""
FREE = 0.05
"""Fraction of a GPU's memory that a plan leaves free."""
TRANSFER_BUFFER = 2**30
"""Bytes on a learner's GPU of the buffer from which vLLM's transfer sends weights."""
SERVER_BYTES = 1e9
"""Bytes per GPU for CUDA in a process that samples beside the learner's."""
VLLM_WORK = 3e9
"""Bytes of vLLM's memory for activations and CUDA graphs."""
HEAD_LOGITS = 2**28
"""Logits in a GPU's memory at a time (``models.policy.MAX_LOGITS_GPU``)."""
LOGIT_BYTES = 20
"""Bytes per such logit: itself, softmax, log-softmax and two gradients in float32."""
HOST_RANK = 4e9
"""Bytes of host memory for Python and CUDA, per rank and per player in a process of its own."""
HOST_SERVER = 6e9
"""Bytes of host memory per vLLM process."""
HOST_TOKEN = 55
"""Bytes of host memory per token of a step, in each rank: every rank holds all episodes."""
