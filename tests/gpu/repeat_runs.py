"""The same problems in several processes give the same bytes: repeat_runs.py TOOL [--device cuda]. Exit status 77: no GPU."""
import argparse
import array
import hashlib
import json
import pathlib
import random
import struct
import subprocess
import sys
import tempfile

DTYPES = {"F32": "f", "BF16": "H", "F16": "e"}
MODS = ["noop", "causal", "softcap(5)", "score + 0.125 * (q_idx - kv_idx) / (h + 1)", "where(q_idx % 7 != kv_idx % 3, score, -inf)"]


def encode(values, dtype):
    if dtype == "BF16":
        return array.array("H", [struct.unpack("<I", struct.pack("<f", x))[0] >> 16 for x in values]).tobytes()
    return struct.pack(f"<{len(values)}{DTYPES[dtype]}", *values)


def write_problem(path, dtype, batch, heads, heads_kv, seqlen, head_dim, seed):
    generator = random.Random(seed)
    # Values drawn once and walked through with a stride: cheap, and no row is another's.
    pool = [generator.gauss(0, 1) for _ in range(10007)]
    header, data = {}, b""
    for name, n in (("q", heads), ("k", heads_kv), ("v", heads_kv)):
        size, step = batch * n * seqlen * head_dim, generator.randrange(1, 10007)
        encoded = encode([pool[i * step % 10007] for i in range(size)], dtype)
        header[name] = dict(dtype=dtype, shape=[batch, n, seqlen, head_dim], data_offsets=[len(data), len(data) + len(encoded)])
        data += encoded
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", default=["sm80", "math"])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    failures = compared = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for number, (dtype, shape) in enumerate([("BF16", (2, 8, 2, 333, 128)), ("F16", (1, 4, 4, 257, 64)),
                                                 ("F32", (1, 2, 1, 190, 72))]):
            problem = folder / f"{number}.safetensors"
            write_problem(problem, dtype, *shape, seed=number)
            for backend in args.backends:
                for mod in MODS:
                    digests = set()
                    for run in range(args.runs):
                        output = folder / f"out{run}.safetensors"
                        done = subprocess.run([args.tool, "run", f"--score-mod={mod}", "--input", problem, "--output", output,
                                               "--device", args.device, "--backend", backend], capture_output=True, text=True)
                        if done.returncode == 2 and "there is no GPU" in done.stderr:
                            print("skipped:", done.stderr.strip())
                            return 77
                        if done.returncode != 0:
                            print(f"{dtype} {shape} {backend} {mod}: {done.stderr.strip()}")
                            failures += 1
                            break
                        digests.add(hashlib.sha256(output.read_bytes()).hexdigest())
                    compared += 1
                    if len(digests) > 1:
                        print(f"{dtype} {shape} {backend} {mod}: {len(digests)} different results of {args.runs} runs")
                        failures += 1
    print(f"{compared} problems in {args.runs} processes each: {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
