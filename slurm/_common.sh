# shellcheck shell=bash
# Sourced by the scripts of this folder and by those that `sfa submit` writes: reads the site's settings, prepares the
# rendezvous, runs the one srun, and requeues a preempted job.
#
# Needs SFA_ROOT (the repository) and a Slurm job around it. Gives run_training.
# Exit codes are train.py's: 0 done, 64 wrong command line, 65 bad data, 70 internal error or lost rank, 74 disk,
# 75 preempted with its state saved (here: requeued), 78 bad recipe.
set -euo pipefail

fail() { # fail CODE MESSAGE
    echo "${SLURM_JOB_NAME:-slurm}: $2" >&2
    exit "$1"
}

read_options() { # sets recipe and run_dir from the arguments, as train.py reads them: the last one wins
    local word option="" name="" stem
    recipe="" run_dir=""
    for word in "$@"; do
        case $option$word in
            --recipe=*) recipe=${word#--recipe=} ;;
            --run-dir=*) run_dir=${word#--run-dir=} ;;
            --set=name=*) name=${word##*name=} ;;
        esac
        option=""
        case $word in --recipe | --run-dir | --set) option=$word= ;; esac
    done
    [[ -f $recipe ]] || fail 78 "no recipe $recipe in $PWD: run sbatch from the repository's root, or set SFA_ROOT"
    name=${name:-$(recipe_name)}
    stem=${recipe##*/}
    run_dir=${run_dir:-runs/${name:-${stem%.*}}}
}

recipe_name() { # what `name:` says in the recipe, nothing where it is named by its file
    sed -e '/^name:/!d' -e 's/\r$//' -e 's/^name: *//' -e tvalue -e :value \
        -e 's/^"\([^"]*\)".*/\1/' -e t -e "s/^'\([^']*\)'.*/\1/" -e t -e 's/ #.*//' -e 's/ *$//' "$recipe"
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
    export SFA_NODES=${hosts//$'\n'/ } # by which messages name the nodes of ranks
    # From the job id and not random, so that all nodes agree; below the ephemeral ports.
    export MASTER_PORT=$((${SFA_PORT_BASE:-20000} + SLURM_JOB_ID % 10000))
    export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
    # Since Slurm 22.05 srun no longer takes --cpus-per-task from the job: each task would get one core.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
}

set_command() { # sets command, the one srun: one process per task, each on its own cores, all ended with the first
    command=(srun --kill-on-bad-exit=1 "--cpu-bind=${SFA_CPU_BIND:-cores}")
    # shellcheck disable=SC2206 # several words each
    command+=(${SFA_SRUN_OPTIONS:-} ${SFA_CONTAINER:-} python)
    command+=("${SFA_PROGRAM[@]-sfa_dist/train.py}")
    if [[ -n ${SFA_STAGE_DIR:-} ]]; then
        command+=(--set "data.remote.cache_dir=$SFA_STAGE_DIR" --set data.remote.stage=true)
        [[ -z ${SFA_STAGE_GIB:-} ]] || command+=(--set "data.remote.cache_gib=$SFA_STAGE_GIB")
    fi
    command+=("$@") # last, so that a --set of the user wins
}

forward_stop() { # to the steps, not to this shell; requeueing here instead would kill the step before it has saved
    interrupted=1
    stop_asked=1
    echo "$SLURM_JOB_NAME: stop asked for at $(date +%T); train.py saves its state and leaves with 75" >&2
    if [[ -n $step ]]; then
        scancel --signal=USR1 "$job" || kill -USR1 "$step" || true
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

requeues_without_progress() { # how many requeues in a row, with the one to come, found the same checkpoints
    local place last_job="" last_place="" count=0
    # Names tell: a checkpoint is named by its step, a shard of a feature cache by its number.
    place=$(cd -- "$run_dir" 2>/dev/null && # names from here on: the run directory may itself lie below a cache/
        find . -name done.json -o -path '*/checkpoints/step-*' -prune -o -path '*/cache/*' |
        sed '/\.tmp/d' | sort | cksum) || place=""
    read -r last_job count last_place 2>/dev/null <"$run_dir/requeues" || true
    if [[ $last_job != "$job" || $last_place != "$place" ]]; then
        count=0
    fi
    mkdir -p -- "$run_dir" && echo "$job $((count + 1)) $place" >"$run_dir/requeues" ||
        echo "$SLURM_JOB_NAME: cannot write $run_dir/requeues, so requeues without progress are not counted" >&2
    echo $((count + 1))
}

requeue() {
    local limit=${SFA_MAX_REQUEUES:-5} state
    # A job that its owner cancelled also ends with 75; requeueing would bring it back.
    state=$(scontrol -o show job "$job" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p') || state=""
    case $state in
        CANCELLED | COMPLETING) echo "$SLURM_JOB_NAME: cancelled, or requeued by Slurm: no requeue from here" >&2 ;;
        *)
            if (($(requeues_without_progress) > limit)); then
                fail 75 "requeued $limit times without a new checkpoint in $run_dir (SFA_MAX_REQUEUES=$limit): give it \
more time, save more often (checkpoint.every_steps), and submit the same script again to go on"
            fi
            scontrol requeue "$job" || fail 75 "cannot requeue; submit the same script again to go on"
            ;;
    esac
}

run_training() { # run_training ARGUMENTS: train.py with these, its exit code passed on, requeued on 75
    [[ -n ${SLURM_JOB_ID:-} ]] || fail 64 "no Slurm job around: submit this script with sbatch"
    SLURM_JOB_NAME=${SLURM_JOB_NAME:-sfa}
    # The number of an array's last task names the whole array too.
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-0}}
    job=${job:-$SLURM_JOB_ID}
    step=""
    stop_asked=0
    trap forward_stop USR1 TERM
    cd "$SFA_ROOT"
    load_site
    read_options "$@"
    set_rendezvous
    set_command "$@"
    status=75
    if ((!stop_asked)); then
        # srun stays in the background: bash runs a trap only after the foreground command has ended.
        "${command[@]}" &
        step=$!
        wait_for_step
    fi
    trap '' USR1 TERM
    # 138: the signal came before train.py could take it, so there was nothing new to save. 143: the first task had
    # left, and srun ended another one that was still about to.
    if ((status == 75 || (stop_asked && (status == 138 || status == 143)))); then
        requeue
    fi
    exit "$status"
}
