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
  getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }'
}

urls=()
if ((learners < ${#nodes[@]})); then
  VLLM_API_KEY=$(openssl rand -hex 32)
  export VLLM_API_KEY
fi
for node in "${nodes[@]:learners}"; do
  SAMPLER_HOST=$(address "$node") srun --nodes 1 --ntasks 1 --nodelist "$node" --exact \
    bash "$here/sampler.sh" "$MODEL" "$CONTEXT" &
  urls+=("http://$(address "$node"):8000")
done
for url in "${urls[@]}"; do # loading a model takes minutes
  until curl --silent --fail --output /dev/null "$url/health"; do sleep 5; done
done

engine=()
if ((${#urls[@]})); then
  engine=(--engine "server+nccl:$(IFS=, && echo "${urls[*]}")")
fi
srun --nodes "$learners" --ntasks "$learners" --nodelist "$(IFS=, && echo "${nodes[*]:0:learners}")" \
  torchrun --nnodes "$learners" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$(address "${nodes[0]}"):29500" \
  -m research_agent.cli train "$preset" --output "$output" "${engine[@]}" "$@"
