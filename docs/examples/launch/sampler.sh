#!/usr/bin/env bash
# Start a vLLM server on all GPUs of this node, as a run needs it:
#
#   sampler.sh MODEL CONTEXT
#
# It listens on the node's address in the private network only (SAMPLER_HOST names another one). TP
# is the number of GPUs per copy of the weights. VLLM_API_KEY is the key that the learner has too.
set -euo pipefail

model=$1 context=$2
: "${VLLM_API_KEY:?give the same key to the servers and to the learner}"
host=${SAMPLER_HOST:-$(hostname -I | cut -d' ' -f1)}
tp=${TP:-1} gpus=${GPUS:-8}

export VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1
exec vllm serve "$model" --host "$host" --port "${SAMPLER_PORT:-8000}" \
  --tensor-parallel-size "$tp" --data-parallel-size "$((gpus / tp))" \
  --api-server-count 1 --dtype bfloat16 --max-model-len "$context" \
  --enable-scale-out --logprobs-mode processed_logprobs \
  --weight-transfer-config '{"backend": "nccl"}'
