#!/bin/bash
# ViViT-g (1.5B), 48 frames, on 4 nodes of 8 GPUs (64 clips a step: 2 a GPU).
#
#     sbatch -A ACCOUNT -p PARTITION slurm/vivit_g_48f.sh [options of train.py]
#
# from the repository's root. Account and partition may also come as SBATCH_ACCOUNT and SBATCH_PARTITION; options of
# sbatch before the script's name replace the lines below (--nodes=1, --time=...). See cluster.env.example.
#SBATCH --job-name=vivit_g_48f
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

# sbatch runs a copy of this file in its spool directory: paths come from where it was submitted, not from $0.
SFA_ROOT=${SFA_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
if [[ ! -f $SFA_ROOT/slurm/_common.sh ]]; then
    echo "$SFA_ROOT is not the repository: run sbatch from its root, or set SFA_ROOT" >&2
    exit 64
fi
# shellcheck source=/dev/null
source "$SFA_ROOT/slurm/_common.sh"

run_training --recipe recipes/g_48f.yaml "$@"
