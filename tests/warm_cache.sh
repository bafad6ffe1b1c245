#!/usr/bin/env bash
# Compiles the binaries of the numerics suite on a GPU into a cache folder, on all cores; needs NVRTC and no GPU.
# warm_cache.sh NUMERICS_PROGRAM ARCH CACHE_DIR [ARGUMENT OF THE PROGRAM...]
set -euo pipefail
program=$1 arch=$2
mkdir -p -m 700 "$3"
export ATTNJIT_CACHE_DIR=$3
shift 3
jobs=$(nproc)
pids=()
for ((i = 0; i < jobs; i++)); do
  GTEST_TOTAL_SHARDS=$jobs GTEST_SHARD_INDEX=$i "$program" --device cuda --compile-only "$arch" "$@" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
du -sh "$ATTNJIT_CACHE_DIR"
exit $status
