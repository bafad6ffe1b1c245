#!/usr/bin/env bash
# Runs the bundle of the target gpu_bundle on a machine with a GPU: run_gpu.sh BUNDLE_DIR OUT_DIR [PART...]
# The parts, in this order, all without any named:
#   info      the machine, the driver, where NVRTC and cuBLAS were found
#   warm      compiles the binaries of the numerics suite into a cache (BUNDLE_DIR/cache, where it is there, is its start)
#   tests     streams, CUDA graphs, threads; the tests of the public interface, and its Python face
#   sm90      the numerics suite's forwards on Hopper's fused kernels, which serve some; the others as in the next part but
#             one
#   few       the same as if there were five multiprocessors: larger tiles of queries, and blocks with many of them
#   sm80      the numerics suite on the fused kernels
#   math      the numerics suite on the eager kernels
#   sanitize  compute-sanitizer, memcheck and racecheck, on a small set of both
#   repeat    the same problems in several processes: the same bytes
#   cache     16 processes on one cold cache; damaged cache entries
#   times     compile times cold, from disk, warm; the host's time of a prepared call
#   sweep     attnjit bench score-mod with its defaults, forward and backward
#   peers     attnjit beside PyTorch's attention
# Each part has a time limit of its own, and all together end within RUN_GPU_MINUTES (9): a part that does not fit is cut
# short or skipped, and says so. OUT_DIR gets summary.md, the reports, and logs.tar.gz with one log per part. Ends with a
# table; its exit status is 0 where every part that ran passed.
set -uo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,/^set -uo/p' "$0" | sed '$d; s/^# \{0,1\}//'
  exit 2
fi
bundle=$(cd "$1" && pwd) || exit 2
mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 2
shift 2
all=(info warm tests sm90 few sm80 math sanitize repeat cache times sweep peers)
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
for part in "${parts[@]}"; do
  case " ${all[*]} " in *" $part "*) ;; *) echo "run_gpu.sh: no part $part; there are ${all[*]}" >&2; exit 2 ;; esac
done

minutes=${RUN_GPU_MINUTES:-9}
[[ $minutes =~ ^[1-9][0-9]{0,3}$ ]] || { echo "run_gpu.sh: RUN_GPU_MINUTES is $minutes, and not a whole number" >&2; exit 2; }
deadline=$((SECONDS + minutes * 60 - 10))  # to write the table and pack the logs
logs=$out/logs
mkdir -p "$logs"
work=$(mktemp -d)
finish() {
  tar czf "$out/logs.tar.gz" -C "$out" logs && rm -rf "$logs"
  rm -rf "$work"
}
trap finish EXIT

cores=$(nproc)
shards=$((cores < 12 ? cores : 12))  # each has a CUDA context of its own
python=$(command -v python3 || true)

# NVRTC and cuBLAS are the toolkit's or those of Python's packages; which come first for those that PyTorch loads.
library_path=
for folder in $([ -n "$python" ] && "$python" -c 'import glob, importlib.util
package = importlib.util.find_spec("nvidia")
for place in package.submodule_search_locations if package else []:
    print(*sorted(glob.glob(place + "/*/lib")), sep="\n")') \
    /usr/local/cuda/lib64 /usr/local/cuda/targets/x86_64-linux/lib; do
  if compgen -G "$folder/libnvrtc.so.*" >/dev/null || compgen -G "$folder/libcublas.so.*" >/dev/null; then
    library_path+=${library_path:+:}$folder
  fi
done
export LD_LIBRARY_PATH=$library_path${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export ATTNJIT_LIBRARY=$bundle/lib/libattnjit.so
export PYTHONUNBUFFERED=1
# The cache of the tests: their binaries were built beforehand. What measures compiling uses caches of its own.
export ATTNJIT_CACHE_DIR=$work/cache
mkdir -m 700 "$ATTNJIT_CACHE_DIR"
[ -d "$bundle/cache" ] && cp -r "$bundle/cache/." "$ATTNJIT_CACHE_DIR"
chmod -R go-rwx "$ATTNJIT_CACHE_DIR"
PATH=$PATH:/usr/local/cuda/bin
arch=sm_$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d '. ')
[ "$arch" = sm_ ] && arch=sm_90

# As if there were so many multiprocessors: see part_few.
few_sms=5

# What a backend without gradients is tested by.
forwards='*NumericsExpression*:*NumericsRandom*:*NumericsGenerated*:*NumericsRelation*:*NumericsEdge*:*NumericsReference*-*Slow*'

# The numerics suite in several processes: numerics SECONDS NAME ARGUMENT...
numerics() {
  local limit=$1 name=$2 pids=() status=0 i code
  shift 2
  for ((i = 0; i < shards; i++)); do
    GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$i timeout --foreground "$limit" "$bundle/bin/attnjit_numerics" "$@" \
      >"$logs/$name.$i.log" 2>&1 &
    pids+=($!)
  done
  for i in "${!pids[@]}"; do
    wait "${pids[$i]}"
    code=$?
    [ $code = 0 ] || { status=$code; echo "shard $i of $shards: exit status $code"; }
  done
  cat "$logs/$name".*.log | grep -E '^\[  (FAILED|SKIPPED) ' | sort -u | head -60
  cat "$logs/$name".*.log | awk '/^\[==========\] .* ran\./ {ran += $2} /^\[  PASSED  \]/ {passed += $4}
    END {if (ran) printf "%d tests ran, %d passed\n", ran, passed}'
  return $status
}

part_info() {
  nvidia-smi
  uname -a
  ldd --version | head -1
  echo "libraries: $LD_LIBRARY_PATH"
  "$bundle/bin/attnjit" --version
  "$bundle/bin/attnjit" explain causal --arch "$arch" --dtype bfloat16 --shape 2,16,1024,16,1024,128
}

part_warm() {
  local begin=$SECONDS status=0
  if [ "$arch" = sm_90 ]; then
    attempt numerics "$1" warm.sm90 --device cuda --compile-only "$arch" --backend sm90 --gtest_filter="$forwards"
    ATTNJIT_CUDA_MAX_SMS=$few_sms attempt numerics $(($1 - SECONDS + begin)) warm.few --device cuda --compile-only "$arch" \
      --backend sm90 --gtest_filter="$forwards"
  fi
  attempt numerics $(($1 - SECONDS + begin)) warm --device cuda --compile-only "$arch"
  cat "$logs"/warm.*.log | awk '/ problems: / {p += $1; c += $3; f += $5; x += $7}
    END {printf "%d problems: %d compiled, %d found in the cache, %d failed\n", p, c, f, x}'
  return $status
}

# Runs a command; `status` becomes the first failure's, or 77 where nothing failed and something was skipped.
attempt() {
  local code=0
  "$@" || code=$?
  if [ $code != 0 ] && { [ "$status" = 0 ] || [ "$status" = 77 ]; }; then status=$code; fi
}

part_tests() {
  local status=0
  attempt "$bundle/bin/attnjit_gpu_test"
  [ ! -x "$bundle/bin/attnjit_example_cuda_graph" ] || attempt "$bundle/bin/attnjit_example_cuda_graph"
  # Its tests on CUDA devices want a driver that is not there: they are for machines without a GPU.
  attempt "$bundle/bin/attnjit_api_test" --gtest_filter=-CudaApi*
  attempt "$python" "$bundle/python/ctypes_test.py" "$bundle/python" "$ATTNJIT_LIBRARY"
  return "$status"
}

hopper() {
  local status=0
  numerics "$1" "$2" --device cuda --backend sm90 --gtest_filter="$forwards" || status=$?
  cat "$logs/$2".*.log | grep '^skipped: ' | sort -u
  cat "$logs/$2".*.log | awk '/^sm90 ran / {ran += $3}
    sub(/ problems were another backend.s: /, " ") {count = $1; $1 = ""; others[$0] += count}
    END {for (why in others) printf "%d problems were another backend\x27s:%s\n", others[why], why
         if (ran) printf "sm90 ran %d times\n", ran}'
  return $status
}
part_sm90() { hopper "$1" sm90; }
# Problems of the suite are small: with all multiprocessors a block seldom has a second tile, and seldom a large one.
part_few() { ATTNJIT_CUDA_MAX_SMS=$few_sms hopper "$1" few; }
part_sm80() { numerics "$1" sm80 --device cuda --backend sm80; }
part_math() { numerics "$1" math --device cuda --backend math; }

# Each instruction is instrumented: few and small problems. Not every machine lets it at the GPU.
sanitizer_set='*NumericsEdge.OneOfEverything*:*NumericsEdge.NoKeys*:*NumericsEdge.EveryHeadDim*:*NumericsExpression*Causal_*:*NumericsExpression*Alibi_*:*NumericsExpression*Document_*:*NumericsExpression*Softcap_*:*NumericsBackwardEdge.N*:*NumericsBackwardExpression*/Causal_*:*NumericsBackwardExpression*/Window_*:*NumericsBackwardExpression*/HeadPair_*:*NumericsBackwardExpression*/ElementGather_*:*NumericsBackwardExpression*/Scalars_*'
sanitizer_set_sm90='NumericsEdge.EveryAlignedHeadDim:*NumericsExpression*Causal_*:*NumericsExpression*Alibi_*:*NumericsExpression*Document_*:*NumericsExpression*Softcap_*:*NumericsReferenceMask*/Blocks64_*:*NumericsReferenceMask*/BlocksAstride_*:*NumericsReferenceGrowth*/Noop_*:*NumericsReferenceLength*/129'
# The suite under both tools: sanitized SECONDS NAME ARGUMENT...
sanitized() {
  local limit=$1 name=$2 tool tools=(memcheck racecheck) i status=0 log pids=()
  shift 2
  # Both at the same time, each in several processes: no more than the tool's ten ports at a time.
  local parts=$((cores < 4 ? 1 : cores < 10 ? cores / 2 : 5))
  for tool in "${tools[@]}"; do
    for ((i = 0; i < parts; i++)); do
      GTEST_TOTAL_SHARDS=$parts GTEST_SHARD_INDEX=$i timeout --foreground "$limit" \
        compute-sanitizer --tool "$tool" --error-exitcode 99 \
        "$bundle/bin/attnjit_numerics" --device cuda "$@" >"$logs/sanitize.$name.$tool.$i.log" 2>&1 &
      pids+=($!)
    done
  done
  local codes=() of
  for i in "${pids[@]}"; do wait "$i"; codes+=($?); done
  for of in "${!tools[@]}"; do
    tool=${tools[of]}
    for ((i = 0; i < parts; i++)); do
      local code=${codes[of * parts + i]}
      log=$logs/sanitize.$name.$tool.$i.log
      if grep -q "Device not supported" "$log"; then
        echo "$tool: this machine's GPU is out of its reach"
        [ $status != 0 ] || status=77
        continue 2
      fi
      echo "$name, $tool, shard $i of $parts: exit status $code$(grep -hoE '(ERROR|RACECHECK) SUMMARY: .*|^\[  (PASSED|FAILED) .*' "$log" |
        head -6 | sed 's/^/; /' | tr -d '\n')"
      # A shard that was cut short, or whose tool said nothing, has checked nothing.
      if [ "$code" = 0 ] && ! grep -qE '(ERROR|RACECHECK) SUMMARY: ' "$log"; then code=99; fi
      [ "$code" = 0 ] && continue
      status=$code  # also where 77 stood
      grep -E -A12 '========= +(Invalid|Error)' "$log" | head -40
    done
  done
  return $status
}
part_sanitize() {
  local begin=$SECONDS status=0
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here"; return 77; }
  if [ "$arch" = sm_90 ]; then
    ATTNJIT_CUDA_MAX_SMS=$few_sms attempt sanitized $(($1 * 2 / 5)) sm90 --backend sm90 --gtest_filter="$sanitizer_set_sm90"
  fi
  attempt sanitized $(($1 - SECONDS + begin)) others --gtest_filter="$sanitizer_set"
  cat "$logs"/sanitize.*.log | awk '/^\[==========\] .* ran\./ {ran += $2} /^\[  PASSED  \]/ {passed += $4}
    END {printf "%d tests ran under a tool, %d passed\n", ran, passed; exit ran == 0}' || [ "$status" != 0 ] || status=1
  return "$status"
}

part_repeat() {
  local backends=(sm80 math)
  [ "$arch" != sm_90 ] || backends+=(sm90)
  "$python" "$bundle/python/repeat_runs.py" "$bundle/bin/attnjit" --jobs "$shards" --backends "${backends[@]}"
}

part_cache() {
  ATTNJIT_CACHE_DIR=$work/cold "$python" "$bundle/python/binary_cache.py" "$ATTNJIT_LIBRARY" race damage
}

part_times() {
  local status=0
  ATTNJIT_CACHE_DIR=$work/times attempt "$python" "$bundle/python/binary_cache.py" "$ATTNJIT_LIBRARY" times
  attempt "$bundle/bin/attnjit_call_overhead" --benchmark_filter=cuda --benchmark_repetitions=3 \
    --benchmark_report_aggregates_only=true
  return "$status"
}

part_sweep() {
  ATTNJIT_CACHE_DIR=$work/sweep "$bundle/bin/attnjit" bench score-mod --device cuda \
    --calculate-bwd --output "$out/sweep.md"
  local status=$?
  [ ! -f "$out/sweep.md" ] || cat "$out/sweep.md"
  return $status
}

part_peers() {
  ATTNJIT_CACHE_DIR=$work/sweep "$python" "$bundle/python/peers.py" --output "$out/peers.jsonl" \
    --time-limit $(($1 - 25)) --mods noop causal rel head_bias alibi --backward
}

declare -A limit=([info]=30 [warm]=200 [tests]=60 [sm90]=150 [few]=150 [sm80]=200 [math]=200 [sanitize]=240 [repeat]=150
  [cache]=90 [times]=60 [sweep]=300 [peers]=420)
table=()
failed=0
for part in "${parts[@]}"; do
  left=$((deadline - SECONDS))
  allowed=$((left < limit[$part] ? left : limit[$part]))
  if [ $allowed -lt 15 ]; then
    table+=("| $part | not run: no time left | | |")
    failed=1
    continue
  fi
  echo "== $part (at most $allowed s)"
  begin=$SECONDS
  # In a process group of its own, which ends as a whole; a part that keeps the limit by itself can still say what it did.
  export -f numerics hopper attempt sanitized "part_$part"
  export bundle out logs work cores shards python arch few_sms forwards sanitizer_set sanitizer_set_sm90
  timeout -k 5 $((allowed + 5)) bash -uo pipefail -c "part_$part $allowed" >"$logs/$part.log" 2>&1
  code=$?
  case $code in
    0) verdict=passed ;;
    77) verdict=skipped ;;
    124 | 137) verdict="cut short" failed=1 ;;
    *) verdict="FAILED ($code)" failed=1 ;;
  esac
  tail -n 25 "$logs/$part.log"
  table+=("| $part | $verdict | $((SECONDS - begin)) s | $(grep -v '^ *$' "$logs/$part.log" | tail -1 | cut -c 1-100 | tr '|' '/') |")
done

{
  echo "| part | result | time | last line |"
  echo "|---|---|---|---|"
  printf '%s\n' "${table[@]}"
} | tee "$out/summary.md"
exit $failed
