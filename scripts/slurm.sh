#!/usr/bin/env bash
# Train on one or more nodes of a SLURM cluster; stopped before the time limit, the job saves and queues itself again.
#
#   sbatch --nodes=2 scripts/slurm.sh scripts/finetune.py loce.yaml runs/loce [key=value ...]
#
# Give it from the repository's folder, which all nodes must see. docs/slurm.md explains the lines.
#SBATCH --job-name=loce
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

if [ $# -lt 3 ]; then
    echo "usage: sbatch scripts/slurm.sh SCRIPT CONFIG RUN_FOLDER [key=value ...]" >&2
    exit 2
fi
script=$1 config=$2 run=$3
shift 3

[ -f .venv/bin/activate ] && source .venv/bin/activate
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120  # seconds for the last step and its checkpoint, in new versions of torch
rm -f "$run/stopped.txt"  # of the time before; what is there afterwards is of this job

srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d --rdzv_endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))" \
    "$script" "$config" output="$run" "$@" &
step=$!
# torchrun does not know SIGUSR1 and would die of it; it passes SIGTERM on.
trap 'kill -TERM "$step"' USR1 TERM

wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do  # a trap ends `wait` before the step has ended
    wait "$step"
    code=$?
done

# torchrun ends with 1 whatever its processes end with: the file says that they were asked to stop, and saved.
if [ "$code" -eq 75 ] || [ -f "$run/stopped.txt" ]; then
    echo "stopped and saved; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
