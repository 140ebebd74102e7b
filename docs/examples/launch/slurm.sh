#!/usr/bin/env bash
# Run on Slurm. The first LEARNERS nodes learn. The others, if there are any, sample.
#
#   sbatch --nodes 1 slurm.sh research-7b runs/research-7b --engine serve:tp=2,dp=4
#   LEARNERS=1 MODEL=Qwen/Qwen2.5-7B CONTEXT=8704 sbatch --nodes 3 slurm.sh research-7b runs/research-7b
#
# All nodes see the output folder. The same command continues a run that was stopped.
#SBATCH --job-name research-agent
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --exclusive
#SBATCH --open-mode append
set -euo pipefail

preset=$1 output=$2
shift 2
here=${LAUNCH_FOLDER:-$SLURM_SUBMIT_DIR/docs/examples/launch}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
learners=${LEARNERS:-${#nodes[@]}}

address() { # prints a node's address in the cluster's private network
  local found
  found=$(getent ahostsv4 "$1" | awk '$1 !~ /^127[.]/ { print $1; exit }')
  echo "${found:-$(hostname -I | cut -d' ' -f1)}" # Debian calls its own machine 127.0.1.1
}

urls=() servers=()
if ((learners < ${#nodes[@]})); then
  VLLM_API_KEY=$(openssl rand -hex 32)
  export VLLM_API_KEY
fi
for node in "${nodes[@]:learners}"; do
  host=$(address "$node")
  SAMPLER_HOST=$host srun --nodes 1 --ntasks 1 --nodelist "$node" \
    bash "$here/sampler.sh" "$MODEL" "$CONTEXT" &
  servers+=($!) urls+=("http://$host:8000")
done
for i in "${!urls[@]}"; do # loading a model takes minutes
  until curl --silent --fail --output /dev/null "${urls[i]}/health"; do
    kill -0 "${servers[i]}" || { echo "the server ${urls[i]} ended" >&2 && exit 1; }
    sleep 5
  done
done

engine=()
if ((${#urls[@]})); then
  engine=(--engine "server+nccl:$(IFS=, && echo "${urls[*]}")")
fi
srun --nodes "$learners" --ntasks "$learners" --nodelist "$(IFS=, && echo "${nodes[*]:0:learners}")" \
  torchrun --nnodes "$learners" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$(address "${nodes[0]}"):29500" \
  -m research_agent.cli train "$preset" --output "$output" "${engine[@]}" "$@"
