#!/usr/bin/env bash
# Builds attnjit and runs the main job: the speedup report over the four score_mods, eager against compiled.
# Arguments go to `attnjit bench score-mod`.
set -euo pipefail
cd "$(dirname "$0")/.."
bash cmake/setup.sh
cmake --preset dev >/dev/null
cmake --build --preset dev -j "$(nproc)" --target attnjit_tool -- --quiet
# They hold OpenBLAS to other kernels than it takes by itself: eager would be slower, and the speedups too good.
unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE
exec build/dev/bin/attnjit bench score-mod "$@"
