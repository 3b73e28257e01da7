# shellcheck shell=bash
# What the *.sbatch files have in common. Sourced after site.sh, never run.

set -u # not while the site file is sourced

# Variables of the submitting shell that srun would read: it moves a step's output out of the log, or ends it early.
unset SLURM_STDOUTMODE SLURM_STDERRMODE SLURM_STDINMODE SLURM_TIMELIMIT

MAX_FAILURES=3
MAX_RESTARTS=100 # preemptions and time limits; a job that needs more makes no progress

: "${TOLD:=0}" # 1: told to stop; from the first line of a *.sbatch on

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

STEP_PID=  # srun of the step under way
SERVER_PID= # srun of a server beside it
SERVER_LOG=
SERVER_LOST=0
WATCH_PID=
tell_step() {
    echo "=== $PART: told to stop, $(date)"
    TOLD=1
    [[ -z $STEP_PID ]] || kill -USR1 "$STEP_PID" 2>/dev/null || true
}

# make_step KIND NODES COMMAND...: leaves in STEP the srun of one task on each of NODES nodes, in the container and
# the environment of KIND (train or sample).
make_step() {
    local kind=$1 nodes=$2 image each listed binds=''
    shift 2
    [[ $kind == train ]] && image=$IMAGE_TRAIN || image=$IMAGE_SAMPLE
    # kill-on-bad-exit: when one node fails the others would wait in a collective until its time-out.
    # wait=0: some sites end a step a while after its first task; the first node's has work to do after the others.
    # cpus-per-task: since Slurm 22.05 a step does not inherit it.
    # export: a job that was submitted with another --export would keep what it sets itself (MASTER_ADDR) from its steps.
    STEP=(srun --export=ALL --kill-on-bad-exit=1 --wait=0 --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1)
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || STEP+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    IFS=, read -ra listed <<<"$MOUNTS"
    for each in "${listed[@]}"; do
        [[ $each == *:* ]] || each=$each:$each # Pyxis wants both sides named
        binds+=${binds:+,}$each
    done
    case $CONTAINER in
    none) ;;
    apptainer)
        # pwd: without it a folder that is not mounted would silently become the home folder
        STEP+=(apptainer exec --bind "$binds" --pwd "$PWD")
        ((GPUS_PER_NODE == 0)) || STEP+=(--nv)
        STEP+=("$image")
        ;;
    enroot) STEP+=(--container-image="$image" --container-mounts="$binds" --container-workdir="$PWD") ;;
    *) give_up "has no known container: $SITE: CONTAINER=$CONTAINER: expected none, apptainer or enroot" ;;
    esac
    # No -u: activation scripts of conda and modules use unset variables.
    # shellcheck disable=SC2016  # expands on the node
    STEP+=(bash -c 'set -eo pipefail; source "$0"; environment "$1"; shift; exec "$@"' "$SITE" "$kind" "$@")
}

# launch KIND NODES COMMAND...: run such a step. Returns when it ended well on all nodes; else decides whether the job
# is requeued, and does not return.
launch() {
    local code
    make_step "$@"
    # In the background, and `wait`: bash runs a trap only between commands, and would wait for srun first.
    ((!TOLD)) || settle 143
    "${STEP[@]}" &
    STEP_PID=$!
    [[ -z $SERVER_PID ]] || watch_server
    ((!TOLD)) || kill -USR1 "$STEP_PID" 2>/dev/null || true # told between the two lines before
    while :; do
        code=0
        wait "$STEP_PID" || code=$?
        # above 128: `wait` itself was interrupted by a signal, or the step ended by one: only the latter is gone
        if ((code <= 128)) || ! kill -0 "$STEP_PID" 2>/dev/null; then break; fi
    done
    STEP_PID=
    [[ -z $WATCH_PID ]] || kill "$WATCH_PID" 2>/dev/null || true
    ((code == 0)) || settle "$code"
}

# watch_server: end the step when the job's own server has ended. The judge would wait for it to come back, and it
# does not.
watch_server() {
    trap 'lose_server' USR2
    (
        while server_lives; do sleep 2; done
        sleep 2 # Slurm may be ending all of the job: then the step ends by itself
        kill -USR2 $$
    ) &
    WATCH_PID=$!
}
lose_server() {
    SERVER_LOST=1
    [[ -z $STEP_PID ]] || kill -TERM "$STEP_PID" 2>/dev/null || true
}

SERVER_WAIT=3600 # seconds; loading a large model takes minutes, an hour is a fault

# serve KIND URL LOG COMMAND...: start a server on the job's node, beside what is launched next; returns when it
# answers at URL/models. It ends with the job.
serve() {
    local kind=$1 url=$2 log=$3 answer begun=$SECONDS
    shift 3
    command -v curl >/dev/null || give_up "needs curl on its node, to see whether the judge server is up"
    answer=$(answer_at "$url")
    if [[ $answer != 000 ]]; then # another user's server, perhaps of another model: its answers must not become labels
        echo "error: another process listens at $url on $SLURM_JOB_NODELIST (status $answer) before the judge server is" \
            "started: end it, or set another port in JUDGE_URL and JUDGE_SERVER"
        settle 1
    fi
    SERVER_LOG=$log
    echo "=== $PART: $(tail -n 1 "$RUN/slurm/attempts/$PART"), server: $*" >>"$SERVER_LOG"
    make_step "$kind" 1 "$@"
    # overlap: a step has its GPUs and cores for itself, and the next one would wait forever
    "${STEP[0]}" --overlap "${STEP[@]:1}" >>"$SERVER_LOG" 2>&1 &
    SERVER_PID=$!
    trap 'kill "$SERVER_PID" 2>/dev/null || true' EXIT
    while ((!TOLD)) && server_lives; do
        # 000: no process listens; 5xx: it is loading; anything else is an answer, which the judge will read
        answer=$(answer_at "$url")
        [[ $answer != [234]* ]] || return 0
        if ((SECONDS - begun > SERVER_WAIT)); then
            echo "error: no answer from the judge server at $url in $SERVER_WAIT s; its log: $SERVER_LOG"
            settle 1
        fi
        sleep 2
    done
    ((!TOLD)) || settle 143
    settle 1
}

# answer_at URL: the HTTP status of URL/models, 000 if no process answers. Without a proxy, as the judge asks.
answer_at() { curl --silent --noproxy '*' --output /dev/null --write-out '%{http_code}' --max-time 5 "$1/models" || true; }

server_lives() { kill -0 "$SERVER_PID" 2>/dev/null; }

# settle CODE: stopped and saved -> back into the queue; a fault -> back, at most MAX_FAILURES times; else the end,
# and with it the chain: what depends on this job is cancelled by --kill-on-invalid-dep.
settle() {
    local code=$1 failures
    ((!SERVER_LOST)) || code=1
    case $code in
    130 | 138 | 143) # SIGINT, SIGUSR1 (before Python could handle it), SIGTERM
        if ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
            give_up "was started $MAX_RESTARTS times and is not finished: raise its time limit in $SITE"
        fi
        echo "=== $PART: interrupted; finished work is kept"
        requeue
        ;;
    esac
    # The error of a judge that lost its server does not concern the recipe.
    if [[ -n $SERVER_PID ]] && ! server_lives; then
        echo "error: the judge server has ended; its log: $SERVER_LOG"
        code=1
    fi
    case $code in
    2) give_up "must be corrected, see the error above: an input or the recipe, not the machine" ;;
    esac
    echo "$(date +%FT%T) job $SLURM_JOB_ID exit $code nodes $SLURM_JOB_NODELIST" >>"$RUN/slurm/failures/$PART"
    failures=$(wc -l <"$RUN/slurm/failures/$PART")
    if ((failures >= MAX_FAILURES)); then
        give_up "failed $failures times (exit code $code)${SERVER_LOG:+; log of the judge server: $SERVER_LOG}"
    fi
    echo "=== $PART: failed ($failures of $MAX_FAILURES), exit code $code"
    requeue
}

give_up() {
    echo "=== $PART: $1. The chain stops here. Log: $LOG. Correct it, then run stepkto slurm submit again."
    echo "$1" >"$RUN/slurm/failures/$PART.stopped"
    exit 1
}

# was_cancelled: does the log say so of this attempt? Slurm appends to it; an earlier one has the same job number.
was_cancelled() {
    awk -v attempt="=== $PART: attempt " \
        -v cancelled="JOB $SLURM_JOB_ID ON .* CANCELLED AT [^ ]+ ([*][*][*]|DUE to SIGNAL)" \
        'index($0, attempt) == 1 { seen = 0 } $0 ~ cancelled { seen = 1 } END { exit !seen }' "$LOG"
}

requeue() {
    # scancel, too, comes as SIGTERM, and putting the job back would undo it. Only the log tells the difference.
    if was_cancelled; then
        echo "=== $PART: cancelled"
        exit 143
    fi
    echo "=== $PART: back into the queue"
    # Preempted, or requeued by a user: Slurm requeues the job by itself and refuses our request.
    # An element by its array's number: the job id of the last one is the array's own, and would put all back.
    local job=$SLURM_JOB_ID
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    scontrol requeue "$job" || echo "=== $PART: Slurm has put the job back already"
    exit 143
}
