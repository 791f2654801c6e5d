# shellcheck shell=bash
# Sourced by the scripts of this folder: prepares the rendezvous, runs the one srun, and requeues a preempted job.
#
# Needs SFA_ROOT (the repository) and a Slurm job around it. Gives run_training.
# Exit codes are train.py's: 0 done, 64 wrong command line, 65 bad data, 70 internal error or lost rank, 74 disk,
# 75 preempted with its state saved (here: requeued), 78 bad recipe.
set -euo pipefail

fail() { # fail CODE MESSAGE
    echo "${SLURM_JOB_NAME:-slurm}: $2" >&2
    exit "$1"
}

check_recipe() { # every --recipe among the arguments is a file
    local previous="" argument recipe
    for argument in "$@"; do
        recipe=""
        [[ $previous == --recipe ]] && recipe=$argument
        [[ $argument == --recipe=* ]] && recipe=${argument#--recipe=}
        if [[ -n $recipe && ! -f $recipe ]]; then
            fail 78 "no recipe $recipe in $PWD: run sbatch from the repository's root, or set SFA_ROOT"
        fi
        previous=$argument
    done
}

load_site() { # what differs between clusters
    local settings=${SFA_CLUSTER_ENV:-$SFA_ROOT/slurm/cluster.env}
    set +u # module and activate read variables that are not set
    if [[ -f $settings ]]; then
        # shellcheck source=/dev/null
        source "$settings"
    elif [[ -n ${SFA_CLUSTER_ENV:-} ]]; then
        fail 64 "SFA_CLUSTER_ENV names $settings, which is not there"
    fi
    if [[ -n ${SFA_VENV:-} ]]; then
        [[ -f $SFA_VENV/bin/activate ]] || fail 64 "SFA_VENV is $SFA_VENV, which is no virtual environment"
        # shellcheck source=/dev/null
        source "$SFA_VENV/bin/activate"
    fi
    set -u
}

set_rendezvous() { # train.py takes rank, world size and local rank from SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID
    local hosts
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # sbatch hands the login shell's environment on: a rank in it would be the rank of every task.
    unset RANK WORLD_SIZE LOCAL_RANK
    export MASTER_ADDR=${hosts%%$'\n'*}
    # From the job id and not random, so that all nodes agree; below the ephemeral ports.
    export MASTER_PORT=$((${SFA_PORT_BASE:-20000} + SLURM_JOB_ID % 10000))
    export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
    # Since Slurm 22.05 srun no longer takes --cpus-per-task from the job: each task would get one core.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
}

forward_stop() { # to the steps, not to this shell; requeueing here instead would kill the step before it has saved
    interrupted=1
    stop_asked=1
    echo "$SLURM_JOB_NAME: stop asked for at $(date +%T); train.py saves its state and leaves with 75" >&2
    if [[ -n $step ]]; then
        scancel --signal=USR1 "$SLURM_JOB_ID" || kill -USR1 "$step" || true
    fi
}

wait_for_step() { # sets status; a trap ends `wait` early, with a status over 128
    while true; do
        interrupted=0
        status=0
        wait "$step" || status=$?
        if ((interrupted == 0 || status <= 128)); then
            return
        fi
    done
}

requeue() {
    local limit=${SFA_MAX_REQUEUES:-50} count=${SLURM_RESTART_COUNT:-0} state
    # A job that its owner cancelled also ends with 75; requeueing would bring it back.
    state=$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p') || state=""
    case $state in
        CANCELLED | COMPLETING) echo "$SLURM_JOB_NAME: the job is $state, so it is not requeued" >&2 ;;
        *)
            if ((count >= limit)); then
                fail 75 "requeued $count times already (SFA_MAX_REQUEUES=$limit); submit the same script again to go on"
            fi
            scontrol requeue "$SLURM_JOB_ID" || fail 75 "cannot requeue; submit the same script again to go on"
            ;;
    esac
}

run_training() { # run_training srun ... : runs it, passes its exit code on, requeues on 75
    [[ -n ${SLURM_JOB_ID:-} ]] || fail 64 "no Slurm job around: submit this script with sbatch"
    SLURM_JOB_NAME=${SLURM_JOB_NAME:-sfa}
    step=""
    stop_asked=0
    trap forward_stop USR1 TERM
    cd "$SFA_ROOT"
    check_recipe "$@"
    load_site
    set_rendezvous
    status=75
    if ((!stop_asked)); then
        # srun stays in the background: bash runs a trap only after the foreground command has ended.
        "$@" &
        step=$!
        wait_for_step
    fi
    trap '' USR1 TERM
    # 138: the signal came before train.py could take it, so there was nothing new to save.
    if ((status == 75 || (stop_asked && status == 138))); then
        requeue
    fi
    exit "$status"
}
