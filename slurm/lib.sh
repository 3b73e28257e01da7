# shellcheck shell=bash
# What the *.sbatch files have in common. Sourced after site.sh, never run.

MAX_FAILURES=3
MAX_RESTARTS=100 # preemptions and time limits; more than that is no progress

# begin STAGE: note the attempt. An array element counts for itself.
begin() {
    STAGE=$1
    PART=$STAGE${SLURM_ARRAY_TASK_ID:+.$SLURM_ARRAY_TASK_ID}
    LOG=$RUN/slurm/logs/$PART.log # as `stepkto slurm submit` names it
    mkdir -p "$RUN/slurm/attempts" "$RUN/slurm/failures"
    echo "$(date +%FT%T) job $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0} nodes $SLURM_JOB_NODELIST" \
        >>"$RUN/slurm/attempts/$PART"
    echo "=== $PART: attempt $(wc -l <"$RUN/slurm/attempts/$PART"), job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $(date)"
    # Slurm signals this shell alone (--signal=B); srun passes a signal on to its tasks.
    trap 'tell_step' USR1 TERM
}

STEP_PID=
tell_step() {
    echo "=== $PART: told to stop, $(date)"
    [[ -z $STEP_PID ]] || kill -USR1 "$STEP_PID" 2>/dev/null || true
}

# launch KIND NODES COMMAND...: one task on each of NODES nodes, in the environment of KIND (train or sample).
# Returns when all ended well; else decides what becomes of the job, and does not return.
launch() {
    local kind=$1 nodes=$2 image code
    shift 2
    [[ $kind == train ]] && image=$IMAGE_TRAIN || image=$IMAGE_SAMPLE
    # kill-on-bad-exit: when one node fails the others would wait in a collective until its time-out.
    # wait=0: some sites end a step a while after its first task; the first node's has work to do after the others.
    # cpus-per-task: since Slurm 22.05 a step does not inherit it.
    local step=(srun --kill-on-bad-exit=1 --wait=0 --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1)
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    local command=("$@")
    case $CONTAINER in
    none) ;;
    apptainer)
        local gpu=()
        ((GPUS_PER_NODE == 0)) || gpu=(--nv)
        command=(apptainer exec "${gpu[@]}" --bind "$MOUNTS" "$image" "$@")
        ;;
    enroot) step+=(--container-image="$image" --container-mounts="$MOUNTS" --container-workdir="$PWD") ;;
    *)
        echo "error: $SITE: CONTAINER=$CONTAINER: expected none, apptainer or enroot"
        exit 2
        ;;
    esac
    if [[ $CONTAINER != enroot ]]; then
        # shellcheck disable=SC2016  # expands on the node
        command=(bash -c 'set -euo pipefail; source "$0"; environment "$1"; shift; exec "$@"' "$SITE" "$kind" "${command[@]}")
    fi
    # In the background, and `wait`: bash runs a trap only between commands, and would wait for srun first.
    "${step[@]}" "${command[@]}" &
    STEP_PID=$!
    while :; do
        code=0
        wait "$STEP_PID" || code=$?
        # above 128: `wait` itself was interrupted by a signal, or the step ended by one: only the latter is gone
        if ((code <= 128)) || ! kill -0 "$STEP_PID" 2>/dev/null; then break; fi
    done
    STEP_PID=
    ((code == 0)) || settle "$code"
}

# settle CODE: stopped and saved -> back into the queue; a fault -> back, at most MAX_FAILURES times; else the end,
# and with it the chain: what depends on this job is cancelled by --kill-on-invalid-dep.
settle() {
    local code=$1 failures
    case $code in
    130 | 138 | 143) # SIGINT, SIGUSR1 (before Python could handle it), SIGTERM
        if ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
            give_up "was started $MAX_RESTARTS times and is not done: raise its time limit in $SITE"
        fi
        echo "=== $PART: interrupted; what is done is kept; back into the queue"
        requeue
        ;;
    2) give_up "must be corrected, see the error above: an input or the recipe, not the machine" ;;
    esac
    echo "$(date +%FT%T) job $SLURM_JOB_ID exit $code nodes $SLURM_JOB_NODELIST" >>"$RUN/slurm/failures/$PART"
    failures=$(wc -l <"$RUN/slurm/failures/$PART")
    if ((failures >= MAX_FAILURES)); then
        give_up "failed $failures times (exit code $code)"
    fi
    echo "=== $PART: failed ($failures of $MAX_FAILURES), exit code $code; back into the queue"
    requeue
}

give_up() {
    echo "=== $PART: $1. The chain stops here. Log: $LOG. Then: stepkto slurm submit again."
    echo "$1" >"$RUN/slurm/failures/$PART.stopped"
    exit 1
}

requeue() {
    # Preempted, or requeued by somebody: Slurm puts the job back by itself, and says no to us.
    # An element by its array's number: the job id of the last one is the array's own, and would put all back.
    local job=$SLURM_JOB_ID
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    scontrol requeue "$job" || echo "=== $PART: Slurm has put the job back already"
    exit 143
}
