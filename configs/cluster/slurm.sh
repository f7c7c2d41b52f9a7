#!/usr/bin/env bash
# Train, encode, sample or run an experiment on any number of nodes under Slurm; goes on by itself after a time limit or pre-emption.
#
#   sbatch --nodes 2 --gpus-per-node 8 configs/cluster/slurm.sh train.py --config tcga_ut/medi out=/shared/runs/medi
#   sbatch --nodes 1 --gpus-per-node 4 configs/cluster/slurm.sh sample.py model=… plan=… out=…
#   sbatch --nodes 2 --gpus-per-node 4 configs/cluster/slurm.sh -m latent_medi.cli encode data=… autoencoder=… out=…
#   sbatch --nodes 2 --gpus-per-node 8 configs/cluster/slurm.sh -m latent_medi.cli run --config tcga_ut/paper out=… …
#
# Submit from the folder that holds what the words name. What stands below is overridden by options of sbatch
# (--partition, --account, --time, …). Environment: PYTHON (default .venv/bin/python if there is one, else python),
# PROCESSES_PER_NODE (default: the node's GPUs, or 1), MASTER_PORT (default: from the job's number).
#
#SBATCH --job-name=latent-medi
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#
# --ntasks-per-node=1   one launcher per node; it starts a process per GPU
# --signal=B:USR1@120   notice to this script 120 s before the time limit (with PreemptParameters=send_user_signal also
#                       before pre-emption); must be enough for the step under way and one checkpoint
# --requeue             Slurm may start the job again after pre-emption or a node's failure

set -euo pipefail

readonly RESUME=75 # "saved; the same command goes on": EX_TEMPFAIL, latent_medi.core.errors.RESUME

if (($# == 0)); then
  echo "usage: sbatch [options of sbatch] $0 train.py|sample.py|-m MODULE words …" >&2
  exit 2
fi
: "${SLURM_JOB_ID:?run it by sbatch}" "${SLURM_JOB_NODELIST:?}"

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python
  if [[ -x .venv/bin/python ]]; then PYTHON=$PWD/.venv/bin/python; fi
fi
export PYTHON
nodes=${SLURM_JOB_NUM_NODES:-1}
each=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=${hosts%%$'\n'*}
port=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))} # below the ports that systems hand out by themselves
# The launcher passes both on. Left in the environment they would make a single process look for others.
unset MASTER_ADDR MASTER_PORT

options=(--num_machines "$nodes" --num_processes "$((nodes * each))" --mixed_precision no --dynamo_backend no)
if ((nodes * each > 1)); then
  options+=(--multi_gpu --main_process_ip "$address" --main_process_port "$port")
fi
if ((nodes > 1)); then
  options+=(--same_network --rdzv_backend static)
fi
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not take it over
  threads=$((SLURM_CPUS_PER_TASK / each))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
fi

echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $nodes nodes of $each processes, main one at $address:$port"

# srun passes signals to every node, and returns the highest exit code of its tasks.
step="" interrupted=0 cancelled=0
# shellcheck disable=SC2317  # called by trap
notice() {
  interrupted=1
  echo "notice: saving, then ending"
  kill -USR1 "$step" 2>/dev/null || true
}
# shellcheck disable=SC2317
cancel() { # by the user, or a pre-emption after which Slurm itself requeues
  interrupted=1 cancelled=1
  kill -TERM "$step" 2>/dev/null || true
}
trap notice USR1
trap cancel TERM

# A launcher ends soon after another one failed, so none needs to be killed at once: that would hide its exit code.
# shellcheck disable=SC2016  # the node's own number, which only the node knows
srun --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=300 \
  bash -c 'exec "$PYTHON" -m latent_medi.launch --machine_rank "$SLURM_NODEID" "$@"' launch "${options[@]}" "$@" &
step=$!

while :; do
  code=0
  wait "$step" || code=$?
  ((interrupted)) || break
  interrupted=0 # a signal ends `wait`, not what is waited for
done

if ((code == RESUME && !cancelled)); then
  echo "requeue: the run goes on where it stopped"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
