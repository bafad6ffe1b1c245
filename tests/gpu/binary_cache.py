"""The cache of CUDA binaries from outside: binary_cache.py LIBRARY [--arch sm_90] PART...
  race    16 processes on one cold cache: every binary is compiled once, all processes end up with the same ones
  damage  entries with a byte flipped, cut short, emptied or exchanged: the result stays the same (needs PyTorch)
  times   milliseconds to prepare a call cold, from disk, and again
With --arch kernels are compiled for that architecture without a GPU, and not run: race and times only. Exit status 77: no
GPU. ATTNJIT_CACHE_DIR is left alone: each part has folders of its own."""
import argparse
import concurrent.futures
import ctypes
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "bench")]

import attnjit_ctypes as attnjit  # noqa: E402  (beside this file, or where the sources have it)

MODS = ["noop", "causal", "softcap(7)", "score + 0.25 * (q_idx - kv_idx)"]
PROCESSES = 16


def has_gpu():
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def compile_call(context, mod, arch, backend="sm80", head_dim=64, seqlen=512):
    """(milliseconds, [(key, origin)]) of preparing one call."""
    q = attnjit.MetaTensor((2, 8, seqlen, head_dim), "bfloat16")
    begin = time.perf_counter()
    call = attnjit.Call(context, q, q, q, q, score_mod=mod, backend=backend, prepare=arch is None)
    explained = call.explain(arch=arch) if arch else call.description()
    milliseconds = (time.perf_counter() - begin) * 1e3
    # A binary may have several of the kernels.
    return milliseconds, list(dict.fromkeys((kernel["key"], kernel["origin"]) for kernel in explained["kernels"]))


def worker(args):
    """Waits for the moment that all begin, prepares the mods, prints what came out."""
    library = attnjit.Library(args.library)
    context = attnjit.Context(library, threads=1)
    time.sleep(max(0.0, args.worker - time.time()))
    found = [binary for mod in MODS for backend in ("sm80", "math") for binary in compile_call(context, mod, args.arch, backend)[1]]
    print(json.dumps(found))


def start_worker(args, cache, begin):
    command = [sys.executable, __file__, args.library, "--worker", str(begin)] + (["--arch", args.arch] if args.arch else [])
    return subprocess.run(command, env=dict(os.environ, ATTNJIT_CACHE_DIR=str(cache)), capture_output=True, text=True)


def race(args):
    with tempfile.TemporaryDirectory() as cache, concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
        begin = time.time() + 2
        done = list(pool.map(lambda _: start_worker(args, cache, begin), range(PROCESSES)))
        seconds = time.time() - begin
    for process in done:
        if process.returncode != 0:
            print("race: a process failed:", process.stderr.strip()[-400:])
            return 1
    lists = [json.loads(process.stdout) for process in done]
    compiles = {}
    for found in lists:
        for key, origin in found:
            compiles[key] = compiles.get(key, 0) + (origin == "compiled")
    wrong = {key: count for key, count in compiles.items() if count != 1}
    same = all([key for key, _ in found] == [key for key, _ in lists[0]] for found in lists)
    print(f"race: {PROCESSES} processes, {len(compiles)} binaries, {sum(compiles.values())} compiles, {seconds:.1f} s")
    if wrong:
        print("race: not compiled exactly once:", wrong)
    if not same:
        print("race: the processes have different binaries")
    return 0 if not wrong and same else 1


def damage(args):
    try:
        import torch
    except ImportError:
        print("damage: skipped: there is no PyTorch")
        return 77
    if args.arch or not torch.cuda.is_available():
        print("damage: skipped: no GPU")
        return 77
    torch.manual_seed(3)
    q, k, v = [torch.randn(1, 2, 200, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    library = attnjit.Library(args.library)

    def result(mod):
        context = attnjit.Context(library)  # what an earlier one had in memory is gone
        o = torch.full_like(q, float("nan"))
        call = attnjit.Call(context, q, k, v, o, score_mod=mod, backend="sm80")
        workspace = torch.empty(call.workspace_size, dtype=torch.uint8, device="cuda")
        call.run(workspace.data_ptr(), torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        origins = {kernel["origin"] for kernel in call.description()["kernels"]}
        return o, origins

    generator = random.Random(11)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ATTNJIT_CACHE_DIR"] = cache
        right = {mod: result(mod)[0] for mod in MODS[:2]}
        if any("disk" not in result(mod)[1] for mod in right):
            print("damage: the cache is not used: nothing would be shown")
            return 1
        entries = {path: path.read_bytes() for path in pathlib.Path(cache).rglob("*") if path.is_file() and path.stat().st_size}
        tried = wrong = accepted = 0
        deadline = time.monotonic() + args.seconds

        def attempt(what):
            nonlocal tried, wrong, accepted
            for mod, expected in right.items():
                try:
                    o, origins = result(mod)
                except attnjit.AttnjitError as error:
                    print(f"damage: {what}: {error}")
                    wrong += 1
                    continue
                tried += 1
                accepted += "compiled" not in origins
                if not torch.equal(o, expected):
                    print(f"damage: {what}: {mod} gives another result")
                    wrong += 1
            for path, content in entries.items():  # an entry that was replaced is as it was; others come back
                path.write_bytes(content)

        paths = list(entries)
        for path in paths:
            content = entries[path]
            # The whole header, then places all over.
            places = list(range(min(len(content), 96))) + sorted(generator.sample(range(len(content)), min(len(content), 200)))
            generator.shuffle(places)
            for place in places:
                if time.monotonic() > deadline:
                    break
                changed = bytearray(content)
                changed[place] ^= 1 << generator.randrange(8)
                path.write_bytes(changed)
                attempt(f"{path.name}: byte {place} of {len(content)} changed")
            for length in (0, 1, 40, len(content) // 2, len(content) - 1):
                path.write_bytes(content[:length])
                attempt(f"{path.name}: cut to {length} bytes")
            path.write_bytes(content + b"\0")
            attempt(f"{path.name}: a byte more")
        for path, other in zip(paths, paths[1:] + paths[:1]):
            path.write_bytes(entries[other])
            attempt(f"{path.name} holds {other.name}")
    print(f"damage: {tried} results from damaged caches, {wrong} wrong; {accepted} without a compile (the undamaged entry)")
    return 1 if wrong or not tried else 0


def times(args):
    library = attnjit.Library(args.library)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ATTNJIT_CACHE_DIR"] = cache
        for backend in ("sm90", "sm80", "math"):
            for head_dim in (64, 128):
                # Warm: NVRTC and the compiler are loaded by an expression that is nobody else's.
                os.environ["ATTNJIT_DISABLE_CACHE"] = "1"
                context = attnjit.Context(library)
                try:
                    compile_call(context, "score * 0.99951171875 + 0.125 * kv_idx", args.arch, backend, head_dim)
                except attnjit.AttnjitError as error:
                    print(f"times: no row for {backend} at head_dim {head_dim}: {error}")
                    continue
                cold = [compile_call(context, mod, args.arch, backend, head_dim)[0] for mod in MODS]
                del os.environ["ATTNJIT_DISABLE_CACHE"]
                filling = attnjit.Context(library)
                for mod in MODS:
                    compile_call(filling, mod, args.arch, backend, head_dim)
                disk, again = [], []
                for _ in range(3):
                    context = attnjit.Context(library)
                    for mod in MODS:
                        milliseconds, binaries = compile_call(context, mod, args.arch, backend, head_dim)
                        assert all(origin != "compiled" for _, origin in binaries), binaries
                        disk.append(milliseconds)
                        again.append(compile_call(context, mod, args.arch, backend, head_dim)[0])
                rows.append((backend, head_dim, cold, disk, again))

    def cell(values):
        return f"{statistics.median(values):.2f} [{min(values):.2f}..{max(values):.2f}]"

    print("| backend | head_dim | cold (ms) | from disk (ms) | same context again (ms) |\n|---|---|---|---|---|")
    for backend, head_dim, cold, disk, again in rows:
        print(f"| {backend} | {head_dim} | {cell(cold)} | {cell(disk)} | {cell(again)} |")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("parts", nargs="*", default=["race", "damage", "times"])
    parser.add_argument("--arch", help="compile for it, without a GPU")
    parser.add_argument("--seconds", type=float, default=45.0, help="of `damage`, about")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if not args.arch and not has_gpu():
        print("skipped: no GPU")
        return 77
    if args.worker is not None:
        return worker(args)
    results = [dict(race=race, damage=damage, times=times)[part](args) for part in args.parts]
    return next((code for code in results if code not in (0, 77)), 0 if 0 in results else 77)


if __name__ == "__main__":
    sys.exit(main())
