# shellcheck shell=bash
# Shell library that the sbatch files of this folder source. It has no site-specific settings.
#
# Set the variables that you need in the shell that submits, because sbatch passes its environment
# on. Or set them here:
#
#   MEGACONSA_MODULES          environment modules to load, such as "cuda/13.0 gcc/13"
#   MEGACONSA_VENV             virtual environment with megaconsa, unless megaconsa and python are
#                              already on the PATH
#   MEGACONSA_PYXIS_IMAGE      container for Enroot and Pyxis: a .sqsh file or a registry's name
#   MEGACONSA_APPTAINER_IMAGE  container for Apptainer: a .sif file
#   MEGACONSA_MOUNTS           folders that a container sees in addition to the working directory:
#                              "/data:/data,/scratch:/scratch"
#   MEGACONSA_SRUN_OPTIONS     more options for srun, such as "--mpi=none --cpu-bind=none"
#   MEGACONSA_MAX_FAILURES     number of failures in a row without a new checkpoint after which a
#                              job is given up (default 3)

set -uo pipefail

say() {
    echo "$(date '+%F %T') slurm: $*"
}

# end CODE WORD...: logs the words as the last line and exits with the code.
end() {
    local code=$1
    shift
    say "$@"
    exit "$code"
}

if [[ -n ${MEGACONSA_PYXIS_IMAGE:-} && -n ${MEGACONSA_APPTAINER_IMAGE:-} ]]; then
    end 2 "refused: MEGACONSA_PYXIS_IMAGE and MEGACONSA_APPTAINER_IMAGE are both set; unset one"
fi
for module in ${MEGACONSA_MODULES:-}; do
    module load "$module" || end 2 "refused: module load $module failed"
done
if [[ -n ${MEGACONSA_VENV:-} ]]; then
    PATH=$MEGACONSA_VENV/bin:$PATH
fi

read -ra srun_options <<<"${MEGACONSA_SRUN_OPTIONS:-}"
inside=()
if [[ -n ${MEGACONSA_PYXIS_IMAGE:-} ]]; then
    srun_options+=(
        --container-image="$MEGACONSA_PYXIS_IMAGE"
        --container-mounts="$PWD:$PWD${MEGACONSA_MOUNTS:+,$MEGACONSA_MOUNTS}"
        --container-workdir="$PWD"
    )
elif [[ -n ${MEGACONSA_APPTAINER_IMAGE:-} ]]; then
    inside=(
        apptainer exec --nv --pwd "$PWD" --bind "$PWD${MEGACONSA_MOUNTS:+,$MEGACONSA_MOUNTS}"
        "$MEGACONSA_APPTAINER_IMAGE"
    )
fi

# In an array, this is the ID of the task. The ID of the array would requeue all its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# Address and port where all tasks meet. The port differs between jobs and between starts of a job.
# It is below the range that the kernel uses for connections.
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=${MASTER_PORT:-$((10000 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0}) % 20000))}
export MASTER_ADDR MASTER_PORT
# End of the job's time in seconds since 1970. Since 23.02, Slurm sets it itself.
if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
    end_of_job=$(squeue --noheader --jobs "$job" --format %e)
    SLURM_JOB_END_TIME=$(date --date="$end_of_job" +%s) && export SLURM_JOB_END_TIME
fi
# Since Slurm 22.05, srun does not inherit this from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# tasks COMMAND...: runs one task per GPU. Sets `code` to the highest exit code of the tasks.
tasks() {
    # --kill-on-bad-exit is off. It would kill ranks that are about to end with the same code, and
    # the code of the kill would hide that code. --wait ends the remaining ranks two minutes after
    # the first one has ended.
    srun --kill-on-bad-exit=0 --wait=120 "${srun_options[@]}" "${inside[@]}" "$@" &
    local step=$!
    interrupted=yes
    while [[ $interrupted ]]; do
        interrupted=
        wait "$step" # A signal interrupts the wait, not the step.
        code=$?
    done
}

# alone COMMAND...: runs one task.
alone() {
    srun --nodes=1 --ntasks=1 --overlap "${srun_options[@]}" "${inside[@]}" "$@"
}

interrupted=
# The sbatch file requests SIGUSR1 before the time limit (--signal=B:USR1@...). This passes it on as
# SIGTERM. The run then finishes its step, saves and exits with 75.
stop() {
    interrupted=yes
    say "SIGUSR1: asking the run to save and stop"
    scancel --signal=TERM "$job" # Reaches the tasks of srun, not this script.
}
trap stop USR1
# The job is preempted or cancelled. Slurm signals the tasks itself.
trap 'interrupted=yes; say "SIGTERM from Slurm"' TERM

# Number of starts after which a job is given up if its failures cannot be counted.
most_uncounted_starts=20
avoided=
# avoid NODES: excludes nodes such as node3,node5 from the next starts, if the partition has enough
# other nodes.
avoid() {
    local nodes=$1 known others
    known=$(squeue --noheader --jobs "$job" --Format ExcNodes:4096 | tr -d ' ')
    [[ -z $known || $known == *null* ]] || nodes=$known,$nodes
    others=$(
        sinfo --noheader --Node --partition "$SLURM_JOB_PARTITION" --format %N \
            --states=IDLE,ALLOC,MIX,COMP,PLANNED |
            sort --unique | grep --count --invert-match --line-regexp --fixed-strings \
            "$(scontrol show hostnames "$nodes")"
    )
    if [[ $others -lt $SLURM_JOB_NUM_NODES ]]; then
        say "$1 failed, but $SLURM_JOB_PARTITION has too few other nodes to do without it"
        return
    fi
    say "$1 failed: excluded from the next starts;" \
        "scontrol update JobId=$job ExcNodeList= allows it again"
    avoided=$nodes
}

# requeue CODE SENTENCE: logs the sentence, requeues the job and exits with the code.
requeue() {
    local state
    state=$(squeue --noheader --jobs "$job" --format %T 2>&1)
    # Only a running job may be requeued. scontrol would revive a job that is being cancelled.
    [[ $state == RUNNING ]] ||
        end "$1" "$2; Slurm has the job as $state and decides what becomes of it"
    say "$2; requeued"
    # The same scontrol process requeues the job and then sets the nodes to avoid. Slurm accepts the
    # nodes only for a pending job, and requeueing kills this script.
    if ! {
        echo "requeue $job"
        [[ -z $avoided ]] || echo "update JobId=$job ExcNodeList=$avoided"
    } | scontrol --quiet; then
        end "$1" "$2, but scontrol could not requeue the job; submit it again to continue"
    fi
    exit "$1"
}

# train CONFIG [section.field=value ...]: returns when the run is finished. Otherwise ends the job,
# and requeues it if another start may succeed.
train() {
    local verdict
    local start=$((${SLURM_RESTART_COUNT:-0} + 1))
    say "job $job on $SLURM_JOB_NODELIST, start $start: megaconsa train $*"
    tasks megaconsa train "$@"
    case $code in
        0) return ;;
        2)
            end 2 "refused; see the line that begins with \"error:\"." \
                "Not requeued: the same input would be refused again"
            ;;
        75) requeue 75 "stopped after saving a checkpoint" ;;
    esac
    local verdict_code=0
    verdict=$(
        alone python -m megaconsa.cluster.restarts \
            "$job" "$code" "${MEGACONSA_MAX_FAILURES:-3}" "$@"
    ) || verdict_code=$?
    if [[ $verdict_code == 0 ]]; then
        # The second line of the verdict names the nodes to avoid.
        [[ $verdict != *$'\n'* ]] || avoid "${verdict##*$'\n'}"
        requeue "$code" "${verdict%%$'\n'*}"
    fi
    # Storage that did not respond to the run may not let the failures be counted either. Then
    # Slurm's own count of starts limits the restarts.
    local may_restart=
    [[ ${SLURM_RESTART_COUNT:-0} -ge $most_uncounted_starts ]] || may_restart=yes
    if [[ $code == 76 && $verdict_code == 76 && $may_restart ]]; then
        requeue "$code" "exit code $code, and the failures before it cannot be read at the moment"
    fi
    : "${verdict:=exit code $code, and the failures before it could not be counted}"
    end "$code" "$verdict; not requeued"
}
