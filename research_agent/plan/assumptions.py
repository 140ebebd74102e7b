"""What a plan assumes; every plan prints these. None of it was measured on such machines."""

from __future__ import annotations

EPISODE_TOKENS = 1_300
"""Tokens of an episode in the mean: that of R1-Searcher's recorded trajectories."""
ACTION_SHARE = 0.3
"""Share of an episode's tokens that the policy samples; the rest is read."""
LONGEST = 6.0
"""Tokens of the longest episode of a step, in means; never more than --max-response allows."""
CALLS = 3
"""Turns of an episode that wait for the environment."""
CALL_SECONDS = 0.5
"""Seconds that the environment takes for a turn."""

LEARN_FLOPS = 0.3
"""Share of the peak that forward and backward passes reach."""
SAMPLE_BANDWIDTH = 0.6
"""Share of the memory's bandwidth that decoding reaches."""
DECODE_SECONDS = 0.006
"""Seconds of a decoding step of vLLM without reading weights and cache: scheduling, launches."""
TRANSFORMERS_SECONDS = 0.03
"""The same of the transformers engine, which has no CUDA graphs."""
TENSOR_PARALLEL_SECONDS = 20e-6
"""Seconds of one all-reduce between the GPUs of a sampler; there are two per layer."""
LINK_SHARE = 0.6
"""Share of a link's peak that collectives reach."""
TRANSFER = 30e9
"""Bytes per second of weights from the learner to the samplers, from GPU to GPU."""
DISK = 2e9
"""Bytes per second to and from the folder of the run."""
HOST_LINK = 25e9
"""Bytes per second between a GPU and its host."""
HOST_BANDWIDTH = 200e9
"""Bytes per second of a host's memory, which its ranks share."""
GATHER_SECONDS = 3e-4
"""Seconds for each episode of a step, to give its tokens to all ranks and make tensors of them."""

CUDA_BYTES = 4e9
"""Bytes of a GPU that CUDA, NCCL and fragments take in the learner's process."""
FREE = 0.05
"""Share of a GPU's memory that a plan leaves free."""
SERVER_BYTES = 1e9
"""Bytes of a GPU that CUDA takes in a vLLM process of its own."""
VLLM_WORK = 3e9
"""Bytes of vLLM's share that activations and CUDA graphs take."""
HEAD_LOGITS = 2**28
"""Logits that exist at the same time on a GPU (``models.policy.MAX_LOGITS_GPU``)."""
LOGIT_BYTES = 20
"""Bytes for each of these: logits, their softmax, its logarithm, and two gradients in float32."""
HOST_RANK = 4e9
"""Bytes of host memory that a rank's Python and CUDA take."""
HOST_SERVER = 6e9
"""Bytes of host memory that a vLLM process takes."""
HOST_TOKEN = 55
"""Bytes of host memory of a token, in each rank, which has the episodes of all."""
