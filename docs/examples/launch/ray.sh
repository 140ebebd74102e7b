#!/usr/bin/env bash
# Run on a Ray cluster of nodes with eight GPUs: each command is a job that gets a node of its own.
#
#   export RAY_ADDRESS=http://HEAD:8265 SHARED=/a/folder/that/all/nodes/see
#   SAMPLERS=2 MODEL=Qwen/Qwen2.5-7B CONTEXT=8704 ray.sh research-7b "$SHARED/runs/research-7b"
#
# Ray chooses the nodes, and runs this script again on them. So each server writes its address into
# the shared folder, and the learner, on one node, waits for all of them. Without SAMPLERS, add
# --engine serve:tp=2,dp=4.
set -euo pipefail

here=${LAUNCH_FOLDER:-$PWD/docs/examples/launch}

sample() { # FILE HERE MODEL CONTEXT, on a node of its own
  host=$(hostname -I | cut -d' ' -f1)
  echo "http://$host:8000" > "$1"
  SAMPLER_HOST=$host exec bash "$2/sampler.sh" "$3" "$4"
}

in_time() { # loading a model takes minutes
  ((SECONDS < 3600)) || { echo "not all servers answer after an hour" >&2 && exit 1; }
  sleep 5
}

learn() { # FOLDER COUNT PRESET FLAG..., on a node of its own
  folder=$1 count=$2
  shift 2
  while (($(find "$folder" -type f | wc -l) < count)); do in_time; done
  urls=$(cat "$folder"/* 2> /dev/null | paste -sd, - || true)
  for url in ${urls//,/ }; do
    until curl --silent --fail --output /dev/null "$url/health"; do in_time; done
  done
  exec torchrun --standalone --nproc-per-node 8 --max-restarts 3 \
    -m research_agent.cli train "$@" ${urls:+--engine "server+nccl:$urls"}
}

case $1 in sample | learn) "$@" ;; esac

preset=$1 output=$2
shift 2
samplers=${SAMPLERS:-0}
id=$(date +%Y%m%d-%H%M%S)-$$
folder=$SHARED/research-agent-$id
mkdir -p "$folder"
environment=$(mktemp) # only this user can read it; the arguments of a command are seen by all

finish() { # also after Ctrl-C
  rm "$environment"
  ray job stop "learner-$id" || true
  for ((i = 0; i < samplers; i++)); do ray job stop "sampler-$id-$i" || true; done
}
trap finish EXIT
# A job that is stopped has ten minutes to save, where Ray would give it three seconds.
printf '{"env_vars": {"VLLM_API_KEY": "%s", "RAY_JOB_STOP_WAIT_TIME_S": "600"}}\n' \
  "$(openssl rand -hex 32)" > "$environment"

for ((i = 0; i < samplers; i++)); do
  ray job submit --no-wait --submission-id "sampler-$id-$i" --entrypoint-num-gpus 8 \
    --runtime-env "$environment" -- \
    bash "$here/ray.sh" sample "$folder/$i" "$here" "$MODEL" "$CONTEXT"
done

ray job submit --submission-id "learner-$id" --entrypoint-num-gpus 8 \
  --runtime-env "$environment" -- \
  bash "$here/ray.sh" learn "$folder" "$samplers" "$preset" --output "$output" "$@"
