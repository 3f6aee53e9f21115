#!/bin/sh
# Start one run on several nodes, the same line on each node:
#   NODES=4 HEAD=node0:29500 launch/torchrun.sh configs/mixtral_8x7b.yaml run.dir=/shared/runs/mixtral
# NODES   how many nodes (1), or MIN:MAX where parallel.elastic=true; one that is silent for 6 s counts as lost
# HEAD      host:port of any one of them (localhost:29500)
# RANKS   ranks on this node (one a GPU, or one a core)   JOB   a name that tells two jobs on one head apart
# RESTARTS   how often the ranks are started again, from the last checkpoint, when one of them dies (3)
# SIGUSR1 is for the ranks, which then save and leave; torchrun itself would die of it. It gives them all the time that
# they need, where of SIGTERM it leaves them 30 seconds.
set -eu
trap '' USR1
NODES=${NODES:-1}
HEAD=${HEAD:-localhost:29500}
if [ -z "${RANKS:-}" ]; then
    RANKS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
    [ "$RANKS" -gt 0 ] || RANKS=$(nproc)
fi
exec torchrun --nnodes "$NODES" --nproc-per-node "$RANKS" --rdzv-backend c10d --rdzv-endpoint "$HEAD" \
    --rdzv-id "${JOB:-moescale}" --rdzv-conf keep_alive_interval=2,keep_alive_max_attempt=3 --max-restarts "${RESTARTS:-3}" -m moescale train "$@"
