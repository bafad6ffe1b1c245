#!/usr/bin/env bash
# Builds everything and runs every test: tests/run.sh [PRESET] [CTEST ARGUMENT...]
# Without a preset: the format of all sources, ThreadSanitizer on the runtime's concurrent parts, the fuzzer for a
# minute, then all tests of the dev build. With one (dev, release, gcc, asan): the tests of that build. Labels: unit,
# lit, compile, numerics, gpu (skipped without one), fuzz, slow.
# tests/run.sh tidy [FILE...]: clang-tidy on these sources, or on all. Apart, because all take a core 8 s a file.
set -euo pipefail
cd "$(dirname "$0")/.."
bash cmake/setup.sh

preset=${1:-all}
[ $# -gt 0 ] && shift
jobs=$(nproc)

configure() {
  cmake --preset "$1" >"build-$1.log" 2>&1 || { cat "build-$1.log" >&2; return 1; }
  rm -f "build-$1.log"
}

build() {
  configure "$1"
  cmake --build --preset "$1" -j "$jobs" -- --quiet
}

# Needs a dev build, for the generated headers.
tidy() {
  printf '%s\0' "$@" | xargs -0 -r -n 1 -P "$jobs" clang-tidy-22 -p build/dev --quiet
}

if [ "$preset" = tidy ]; then
  build dev
  # Those that are compiled by themselves; headers are checked along with them.
  [ $# -gt 0 ] || mapfile -t sources < <(git ls-files '*.cpp' ':!kernels_templates' ':!examples/embedding' ':!tests/fuzz')
  tidy "${@:-${sources[@]}}"
  exit
fi

if [ "$preset" = all ]; then
  git ls-files -z '*.c' '*.h' '*.hpp' '*.cpp' '*.inc' | xargs -0 clang-format-22 --dry-run --Werror
  for extra in tsan fuzz; do
    build "$extra"
    ctest --preset "$extra" -j 1
  done
  preset=dev
fi
build "$preset"
# Where no toolkit is installed: the one that configuring unpacked.
nvrtc=$PWD/build/$preset/nvrtc/nvidia/cu13/lib/libnvrtc.so.13
if [ -z "${ATTNJIT_NVRTC:-}" ] && [ -e "$nvrtc" ]; then export ATTNJIT_NVRTC=$nvrtc; fi
exec ctest --preset "$preset" -j "$jobs" -LE slow "$@"
