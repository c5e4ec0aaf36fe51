#!/usr/bin/env bash
# Try the image and the cluster of compose.yaml: it trains, loses a node, gets it back, and ends.
#
#     docker/try.sh [arguments of docker build]
#
# Needs an engine and compose, any version. What it makes goes when it ends, but for the image.
set -euo pipefail
cd "$(dirname "$0")/.."

export COMPOSE_PROJECT_NAME=zeroadam-try$$
export TRAIN=${TRAIN:---steps 600 --eval-every 1000 --width 128 --layers 2 --heads 2 --context 64}
compose=(docker compose)
if ! docker compose version >/dev/null 2>&1; then compose=(docker-compose); fi
cluster() { "${compose[@]}" -f docker/compose.yaml "$@"; }
clean() { cluster down --volumes --timeout 1 >/dev/null 2>&1; }
trap clean EXIT

# Until rank 0, on whichever node that is, has begun to train on $1 ranks for the $2nd time.
until_ranks() {
  for ((second = 0; second < 120; second++)); do
    if [ "$(cluster logs --no-color 2>/dev/null | grep -c "parameters, $1 ranks")" -ge "$2" ]; then
      echo "trains on $1 ranks after $second s"
      return
    fi
    sleep 1
  done
  cluster logs --no-color
  exit 1
}
# Until they have saved another checkpoint.
until_checkpoint() {
  local before
  before=$(cluster exec -T one ls /checkpoints)
  for ((second = 0; second < 60; second++)); do
    if [ "$(cluster exec -T one ls /checkpoints)" != "$before" ]; then return; fi
    sleep 1
  done
  echo "no checkpoint in 60 s"
  exit 1
}

docker build --file docker/Dockerfile --tag zeroadam "$@" .
cluster up --detach --no-build
until_ranks 2 1
until_checkpoint
cluster kill two
until_ranks 1 1
until_checkpoint
cluster start two
until_ranks 2 2
nodes=$(cluster ps --quiet)
for node in $nodes; do
  status=$(docker wait "$node")
  if [ "$status" != 0 ]; then
    cluster logs --no-color
    exit "$status"
  fi
done
cluster logs --no-color | grep "resumed after step"
cluster logs --no-color | grep -A 18 "steps on" # the closing tables
