#!/usr/bin/env bash
# Builds everything and runs every test: tests/run.sh [PRESET] [CTEST ARGUMENT...]
# Without a preset: ThreadSanitizer on the runtime's concurrent parts, the fuzzer for a minute, then all tests of the
# dev build. With one (dev, release, gcc, asan): the tests of that build. Labels: unit, lit, numerics, fuzz, slow.
set -euo pipefail
cd "$(dirname "$0")/.."
bash cmake/setup.sh

preset=${1:-all}
[ $# -gt 0 ] && shift
jobs=$(nproc)

build() {
  cmake --preset "$1" >"build-$1.log" 2>&1 || { cat "build-$1.log" >&2; return 1; }
  rm -f "build-$1.log"
  cmake --build --preset "$1" -j "$jobs" -- --quiet
}

if [ "$preset" = all ]; then
  git ls-files '*.h' '*.hpp' '*.cpp' 2>/dev/null | xargs -r clang-format-22 --dry-run --Werror
  for extra in tsan fuzz; do
    build "$extra"
    ctest --preset "$extra" -j 1
  done
  preset=dev
fi
build "$preset"
exec ctest --preset "$preset" -j "$jobs" -LE slow "$@"
