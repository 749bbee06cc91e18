#!/usr/bin/env bash
# make test-slurm: runs the tests marked slurm. If Slurm is missing, it is first installed from
# Debian's packages, where that is possible.
set -euo pipefail
pytest=$1
PATH=$PATH:/usr/sbin:/sbin

if [[ $(id -u) -ne 0 ]]; then
    echo "test-slurm: not run, because slurmctld and slurmd are started as root here;" \
        "run it as root, in a container for example"
    exit 0
fi
if ! type -P munged slurmctld slurmd sbatch >/dev/null; then
    if ! type -P apt-get >/dev/null; then
        echo "test-slurm: not run, because there is neither Slurm nor apt-get here;" \
            "install munge, slurmctld and slurmd, and run it again"
        exit 0
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends \
        slurm-wlm slurm-client munge >/dev/null
fi
OMP_NUM_THREADS=1 "$pytest" -m slurm tests/slurm
