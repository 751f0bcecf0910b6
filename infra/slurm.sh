#!/bin/bash
# One run on the nodes of a Slurm allocation:  sbatch infra/slurm.sh /shared/config.yaml
# The configuration, the run folder and the checkpoint are on a file system that every node has, or behind URLs. Say `device: gpu`
# in it: then the run waits for the first node's GPUs, and takes the other nodes' as they join.
#SBATCH --job-name=ecif
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail
config=${1:?usage: sbatch infra/slurm.sh CONFIG}

head=$(hostname)                          # a batch script runs on the first node of its allocation
address=$head:$((20000 + SLURM_JOB_ID % 10000)) # another job on the node has another port
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))') # nobody else on the network joins or submits
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1

nodes=()
run=
finish() {
  [ -z "$run" ] || kill -TERM "$run" 2>/dev/null || true
  [ -z "$run" ] || wait "$run" || true
  kill "${nodes[@]}" 2>/dev/null || true
  wait || true
}
trap finish EXIT
trap 'exit 143' TERM INT

per_node=(--ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --overlap)
srun --nodes=1 --ntasks=1 --nodelist="$head" "${per_node[@]}" \
  ray start --head --block --port="${address#*:}" --include-dashboard=false &
nodes+=($!)
for _ in $(seq 60); do
  ray health-check --address "$address" >/dev/null 2>&1 && break
  sleep 2
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  others=$((SLURM_JOB_NUM_NODES - 1))
  srun --nodes="$others" --ntasks="$others" --exclude="$head" "${per_node[@]}" ray start --address="$address" --block &
  nodes+=($!)
fi

RAY_ADDRESS=$address ecif run "$config" & # in the background, so that a signal is answered; the same command resumes
run=$!
code=0
wait "$run" || code=$?
run=
exit "$code"
