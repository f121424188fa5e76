#!/bin/bash
# bcosify align on several nodes of a Slurm cluster, through preemption and time limits.
#
#   sbatch --nodes 4 --gpus-per-node 8 slurm.sh RUN OUT --data 'shards/{00000..00099}.tar' --recipe bcos/vit
#
# RUN is a converted model, OUT the folder for the aligned one; what follows goes to `bcosify align` as it is. CONFIG
# names another configuration of accelerate than several_nodes.yaml, such as that of FSDP.
#
# Two minutes before the job must end, Slurm sends SIGUSR1 to the task of every node. It hands it on to the training
# processes, which write a checkpoint of that very step and exit with 0. A job that ends well without a result is put
# into the queue again, and goes on with --resume. A job that fails is not: its exit code is that of the run.
#SBATCH --job-name=bcosify-align
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

if [ $# -lt 2 ]; then
    echo "usage: sbatch slurm.sh RUN OUT --data SHARDS [--recipe RECIPE] [more of bcosify align]" >&2
    exit 2
fi
RUN=$1 OUT=$2
shift 2

shipped='from importlib.resources import files; print(files("bcosify.recipes.accelerate") / "several_nodes.yaml")'
export CONFIG=${CONFIG:-$(python -c "$shipped")}
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN PORT=$((20000 + SLURM_JOB_ID % 20000))

node() {
    # SIGUSR1 may come to the whole group of the task. The launcher would die of it, so it ignores it; the training
    # processes, in sessions of their own, would not get it, so they are sent it here. SIGTERM (preemption) alike.
    (
        trap '' USR1
        exec accelerate launch --config_file "$CONFIG" \
            --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-1})) \
            --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN" --main_process_port "$PORT" \
            -m bcosify.cli align "$@"
    ) &
    local launcher=$! code
    trap 'pkill -USR1 -P "$launcher"' USR1 TERM
    while true; do
        wait "$launcher"
        code=$?
        # A trap ends `wait` before the launcher has ended.
        if [ "$code" -le 128 ] || ! kill -0 "$launcher" 2>/dev/null; then
            return "$code"
        fi
    done
}
export -f node

resume=()
if [ -f "$OUT.run/recipe.yaml" ]; then
    resume=(--resume)
fi
srun --kill-on-bad-exit=1 bash -c 'node "$@"' node "$RUN" --out "$OUT" "$@" ${resume[@]+"${resume[@]}"}
code=$?
if [ "$code" -eq 0 ] && [ ! -f "$OUT/bcosify.json" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
