"""The same problems in several processes give the same bytes, and so do their deterministic gradients:
repeat_runs.py TOOL [--device cuda]. Exit status 77: no GPU."""
import argparse
import array
import concurrent.futures
import hashlib
import json
import math
import pathlib
import random
import struct
import subprocess
import sys
import tempfile

DTYPES = {"F32": "f", "BF16": "H", "F16": "e"}
MODS = ["noop", "causal", "softcap(5)", "score + 0.125 * (q_idx - kv_idx) / (h + 1)", "where(q_idx % 7 != kv_idx % 3, score, -inf)",
        "where((q_idx + 17) // 96 == kv_idx // 96, score, -inf)"]
# With captured tensors whose gradients are asked for: sums of every structure, places that data decide included.
BACKWARD_MODS = [("noop", []), ("causal", []), ("softcap(5)", []),
                 ("score * gain[h] + table[h, q_idx - kv_idx + 512]", ["gain", "table"]),
                 ("where(q_idx >= kv_idx, score + bias[slot[q_idx]] * float(kv_idx % 5) + bias[kv_idx % 16], -inf)", ["bias"]),
                 ("score + dense[q_idx, kv_idx]", ["dense"])]


def encode(values, dtype):
    if dtype == "BF16":
        return array.array("H", [struct.unpack("<I", struct.pack("<f", x))[0] >> 16 for x in values]).tobytes()
    return struct.pack(f"<{len(values)}{DTYPES[dtype]}", *values)


def write_problem(path, dtype, batch, heads, heads_kv, seqlen, head_dim, seed):
    generator = random.Random(seed)
    # Values drawn once and walked through with a stride: cheap, and no row is another's.
    pool = [generator.gauss(0, 1) for _ in range(10007)]
    header, data = {}, b""

    def add(name, dtype, shape, encoded):
        nonlocal data
        header[name] = dict(dtype=dtype, shape=shape, data_offsets=[len(data), len(data) + len(encoded)])
        data += encoded

    def add_normal(name, dtype, shape):
        size, step = math.prod(shape), generator.randrange(1, 10007)
        add(name, dtype, shape, encode([pool[i * step % 10007] for i in range(size)], dtype))

    for name, n in (("q", heads), ("k", heads_kv), ("v", heads_kv), ("grad_out", heads)):
        add_normal(name, dtype, [batch, n, seqlen, head_dim])
    add_normal("grad_lse", "F32", [batch, heads, seqlen])
    for name, shape in (("gain", [heads]), ("table", [heads, 1024]), ("bias", [16]), ("dense", [seqlen, seqlen])):
        add_normal(name, dtype, shape)
    slots = array.array("i", [generator.randrange(16) for _ in range(seqlen)])
    add("slot", "I32", [seqlen], slots.tobytes())
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class NoGpu(Exception):
    pass


def digest(args, problem, output, backend, mod, extra):
    """Of the output of one process."""
    done = subprocess.run([args.tool, "run", f"--score-mod={mod}", "--input", problem, "--output", output,
                           "--device", args.device, "--backend", backend, *extra], capture_output=True, text=True)
    if done.returncode == 2 and "there is no GPU" in done.stderr:
        raise NoGpu(done.stderr.strip())
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    found = hashlib.sha256(output.read_bytes()).hexdigest()
    output.unlink()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", default=["sm80", "math"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--backward-runs", type=int, default=20, help="of the first problem on the first backend")
    parser.add_argument("--jobs", type=int, default=16, help="processes at a time, of all problems together")
    args = parser.parse_args()
    failures = compared = left_out = 0
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        folder = pathlib.Path(folder)
        runs_of = []  # (what, its processes): those of all problems are handed in before any is waited for
        for number, (dtype, shape) in enumerate([("BF16", (2, 8, 2, 333, 128)), ("F16", (1, 4, 4, 257, 64)),
                                                 ("F32", (1, 2, 1, 190, 72))]):
            problem = folder / f"{number}.safetensors"
            write_problem(problem, dtype, *shape, seed=number)
            sets = [(mod, args.runs, []) for mod in MODS]
            for mod, captured in BACKWARD_MODS:
                wanted = ["--grad", ",".join(captured)] if captured else []
                sets.append((mod, args.backward_runs, ["--backward", "--deterministic", *wanted]))
            for backend in args.backends:
                for mod, runs, extra in sets:
                    if backend == "sm90" and (dtype == "F32" or extra):  # it serves neither
                        left_out += 1
                        continue
                    if number > 0 or backend != args.backends[0]:
                        runs = min(runs, args.runs)
                    what = f"{dtype} {shape} {backend} {mod} {' '.join(extra)}"
                    first = len(runs_of) * max(args.runs, args.backward_runs)
                    runs_of.append((what, [
                        pool.submit(digest, args, problem, folder / f"out{first + run}.safetensors", backend, mod, extra)
                        for run in range(runs)]))
        for what, tasks in runs_of:
            try:
                digests = {task.result() for task in tasks}
            except NoGpu as error:
                pool.shutdown(cancel_futures=True)
                print("skipped:", error)
                return 77
            except RuntimeError as error:
                print(f"{what}: {error}")
                failures += 1
                continue
            compared += 1
            if len(digests) > 1:
                print(f"{what}: {len(digests)} different results of {len(tasks)} runs")
                failures += 1
    print(f"{compared} problems in {args.runs} processes each, backward up to {args.backward_runs}: {failures} failures"
          + (f"; {left_out} that sm90 does not serve were left out" if left_out else ""))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
