#!/bin/sh
# Start one run on several nodes, the same line on each node:
#   NODES=4 HEAD=node0:29500 launch/torchrun.sh configs/mixtral_8x7b.yaml run.dir=/shared/runs/mixtral
# What a user may set, in the environment:
#   NODES      how many nodes (1), or MIN:MAX where parallel.elastic=true; one that is silent for 6 s counts as lost
#   HEAD       host:port of any one of them, by the address that the others reach it at (localhost:29500); each job
#              needs a port of its own: two on one port meet in one store, and the second waits, or ends with the first
#   ADDRESS    this node's own address, where it has several (what its name leads to)
#   RANKS      ranks on this node (one a GPU, or one a core)
#   JOB        a name that tells two jobs apart (moescale)
#   RESTARTS   how often the ranks are started again, from the last checkpoint, when one of them dies (3)
#   COMMAND    train, or doctor, which checks everything without training (train)
#   PYTHON     the Python that has MoEScale (python)
#   MOESCALE_SECRET   a secret that all nodes of the job share; what is not signed with it is not taken in
# With --warm after the configuration, ranks that are started again import nothing (docs/recovery.md).
# SIGTERM, SIGINT, SIGHUP and SIGUSR1 go on to the ranks, which finish their step, save and leave; this process leaves
# with their status, 75 where the same line goes on from there. After nohup SIGHUP is heeded by none of them.
set -eu
HEAD=${HEAD:-localhost:29500}
if [ -z "${RANKS:-}" ]; then
    RANKS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
    [ "$RANKS" -gt 0 ] || RANKS=$(nproc)
fi
exec "${PYTHON:-python}" -m moescale.cluster.agent --nnodes "${NODES:-1}" --nproc-per-node "$RANKS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${JOB:-moescale}" ${ADDRESS:+--local-addr "$ADDRESS"} \
    --rdzv-conf keep_alive_interval=2,keep_alive_max_attempt=3 --max-restarts "${RESTARTS:-3}" \
    -m moescale "${COMMAND:-train}" "$@"
