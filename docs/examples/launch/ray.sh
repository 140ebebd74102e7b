#!/usr/bin/env bash
# Run on a Ray cluster of nodes with eight GPUs: each command is a job that gets a node of its own.
#
#   export RAY_ADDRESS=http://HEAD:8265 SHARED=/a/folder/that/all/nodes/see
#   SAMPLERS=2 MODEL=Qwen/Qwen2.5-7B CONTEXT=8704 ray.sh research-7b runs/research-7b
#
# Ray chooses the nodes. So each server writes its address into the shared folder, and the learner,
# on one node, waits for all of them. Without SAMPLERS, add --engine serve:tp=2,dp=4.
set -euo pipefail

preset=$1 output=$2
shift 2
samplers=${SAMPLERS:-0}
id=$(date +%Y%m%d-%H%M%S)-$$
folder=$SHARED/research-agent-$id
mkdir -p "$folder"
here=${LAUNCH_FOLDER:-$PWD/docs/examples/launch}
environment=$(mktemp) # only this user can read it; the arguments of a command are seen by all

finish() { # also after Ctrl-C
  rm "$environment"
  for ((i = 0; i < samplers; i++)); do ray job stop "sampler-$id-$i" || true; done
}
trap finish EXIT
printf '{"env_vars": {"VLLM_API_KEY": "%s"}}\n' "$(openssl rand -hex 32)" > "$environment"

for ((i = 0; i < samplers; i++)); do
  ray job submit --no-wait --submission-id "sampler-$id-$i" --entrypoint-num-gpus 8 \
    --runtime-env "$environment" -- bash -c '
      host=$(hostname -i | cut -d" " -f1)
      echo "http://$host:8000" > "$1"
      SAMPLER_HOST=$host exec bash "$2" "$3" "$4"
    ' sampler "$folder/$i" "$here/sampler.sh" "$MODEL" "$CONTEXT"
done

ray job submit --submission-id "learner-$id" --entrypoint-num-gpus 8 \
  --runtime-env "$environment" -- bash -c '
    folder=$1 count=$2
    shift 2
    while (($(find "$folder" -type f | wc -l) < count)); do sleep 5; done
    urls=$(cat "$folder"/* 2> /dev/null | paste -sd, -)
    for url in ${urls//,/ }; do
      until curl --silent --fail --output /dev/null "$url/health"; do sleep 5; done
    done
    exec torchrun --standalone --nproc-per-node 8 --max-restarts 3 \
      -m research_agent.cli train "$@" ${urls:+--engine "server+nccl:$urls"}
  ' learner "$folder" "$samplers" "$preset" --output "$output" "$@"
