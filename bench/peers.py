#!/usr/bin/env python3
"""Times attnjit beside PyTorch's attention on one GPU, in one process, and checks every result it times.

    peers.py --library lib/libattnjit.so --mods noop causal -b 2 16 -s 1024 4096 -d 64 128

Rows are printed as JSON, one per contestant and problem, as they are measured; tables of times and ratios come last.

A problem's contestants are each captured in a CUDA graph of as many calls as fill a few milliseconds. The graphs are
replayed in turns, round after round, so that a change of the clocks meets all of them; "us" is the median over the rounds
of the time of one call, "spread" the distance between its quartiles, both of the GPU alone. What cannot be captured is
timed by groups of plain calls and has "graph": false. q, k and v are standard normal and lie as (B, S, H, D), as a
projection leaves them.

With --beside-noop the first of our backends runs noop, too, in the same turns: "over_noop" is a row's "us" over its time
there. By itself each mod has the clock that its own power leaves it; in turns all have the same.

With --backward, gradients of q, k and v are timed as well ("bwd_us"), the backward alone; those of one head of each batch
are held against float64 autograd: "bwd_of_bound" is the largest relative error of dq, dk and dv in units of 4 u.

A contestant's output is compared with float64 attention in some rows of every batch and head; "of_bound" is the largest
error in units of 2 (u_P + u_O) sum_j p_j |v_j|, u being the type's unit roundoff, and a little for the float32 scores. A
result of attnjit's beyond it is wrong: its time is not shown and the exit status is 1. A peer's is only pointed out.
TFLOP/s count 4 B H S^2 d operations, 2.5 times that backward, what a mask lets a kernel skip included.
"""
import argparse
import itertools
import json
import math
import os
import pathlib
import statistics
import sys
import time

import attnjit_ctypes as attnjit

UNIT = {"float32": 2.0 ** -24, "float16": 2.0 ** -11, "bfloat16": 2.0 ** -8}
SDPA = {"fa2": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
PEERS = [*SDPA, "flex", "flex_blockmask"]
NOOP = "noop beside"


class Mod:
    """A mod in both languages: `text` with its captured tensors, `score` as FlexAttention's users write it (also what the
    check evaluates), `mask` where a BlockMask can express it."""

    def __init__(self, text, score, mask=None, captures=None):
        self.text, self.score, self.mask, self.captures = text, score, mask, captures or {}


def make_mod(torch, name, batch, heads, seqlen, dtype):
    device, inf = "cuda", float("inf")

    def masked(keep, text, captures=None):
        return Mod(f"where({text}, score, -inf)", lambda s, b, h, i, j: torch.where(keep(b, h, i, j), s, -inf), keep,
                   captures)

    if name == "noop":
        return Mod("noop", lambda s, b, h, i, j: s)
    if name == "causal":
        return masked(lambda b, h, i, j: i >= j, "q_idx >= kv_idx")
    if name == "rel":
        return Mod("rel", lambda s, b, h, i, j: s + (i - j))
    if name == "head_bias":
        return Mod("head_bias", lambda s, b, h, i, j: s + 2 * h)
    if name == "softcap":
        return Mod("softcap(30)", lambda s, b, h, i, j: 30 * torch.tanh(s / 30))
    if name == "window":
        return masked(lambda b, h, i, j: (i >= j) & (i - j <= 512), "q_idx >= kv_idx and q_idx - kv_idx <= 512")
    if name == "alibi":
        slopes = torch.exp2(torch.arange(1, heads + 1, device=device) * (-8.0 / heads))
        return Mod("score + slopes[h] * (kv_idx - q_idx)", lambda s, b, h, i, j: s + slopes[h] * (j - i),
                   captures={"slopes": slopes})
    if name in ("document", "document_alike"):
        # Eight documents in each batch: cut at random places; or each token beyond the eighth falls to one at random.
        generator = torch.Generator(device).manual_seed(1)
        if name == "document":
            starts = torch.rand(batch, seqlen, device=device, generator=generator).argsort(1) < 7
            ids = starts.to(torch.int32).cumsum(1, dtype=torch.int32)
        else:
            owners = torch.randint(0, 8, (batch, seqlen - 8), device=device, generator=generator)
            every = torch.arange(8, device=device).expand(batch, 8)
            ids = torch.cat([every, owners], 1).sort(1).values.to(torch.int32)
        return masked(lambda b, h, i, j: ids[b, i] == ids[b, j], "ids[b, q_idx] == ids[b, kv_idx]", {"ids": ids})
    if name == "rel_table":
        table = torch.randn(heads, 2 * seqlen, device=device, dtype=dtype)
        return Mod(f"score + table[h, q_idx - kv_idx + {seqlen}]", lambda s, b, h, i, j: s + table[h, i - j + seqlen],
                   captures={"table": table})
    if name == "bias":
        bias = torch.randn(heads, seqlen, seqlen, device=device, dtype=dtype)
        return Mod("score + bias[h, q_idx, kv_idx]", lambda s, b, h, i, j: s + bias[h, i, j], captures={"bias": bias})
    raise ValueError(name)


MODS = ["noop", "causal", "rel", "head_bias", "softcap", "window", "alibi", "document", "document_alike", "rel_table",
        "bias"]


class Contestant:
    """A call on fixed tensors; `result()` is its output, (B, H, S, D). Where there is a `backward`, a call too, `gradients()`
    are dq, dk and dv."""

    def __init__(self, call, result, first_call_s, info=None, backward=None, gradients=None):
        self.call, self.result, self.first_call_s, self.info = call, result, first_call_s, info or {}
        self.backward, self.gradients = backward, gradients


def ours(torch, library, backend, mod, q, k, v, grad_out, args):
    context = attnjit.Context(library)  # its own: nothing of another problem is in it
    o = torch.full_like(q, math.nan)
    lse = None if grad_out is None else torch.empty(q.shape[:3], device="cuda")
    begin = time.perf_counter()
    call = attnjit.Call(context, q, k, v, o, lse=lse, score_mod=mod.text, captures=mod.captures, backend=backend,
                        max_autotune=args.max_autotune)
    prepared = time.perf_counter() - begin
    workspace = torch.empty(call.workspace_size, dtype=torch.uint8, device="cuda")

    def run():
        call.run(workspace.data_ptr(), torch.cuda.current_stream().cuda_stream)

    run()
    torch.cuda.synchronize()
    description = call.description()
    facts = ("entry", "origin", "tile", "warps", "stages", "registers", "spill_store_bytes", "autotune")
    kernels = [{key: kernel[key] for key in facts if key in kernel} for kernel in description.get("kernels", [])]
    contestant = Contestant(run, lambda: o, time.perf_counter() - begin,
                            dict(prepare_s=round(prepared, 4), kernels=kernels))
    if grad_out is not None:
        gradients = [torch.full_like(t, math.nan) for t in (q, k, v)]
        begin = time.perf_counter()
        backward = attnjit.Backward(call, grad_out, dq=gradients[0], dk=gradients[1], dv=gradients[2],
                                    deterministic=args.deterministic)
        contestant.info["bwd_prepare_s"] = round(time.perf_counter() - begin, 4)
        scratch = torch.empty(backward.workspace_size, dtype=torch.uint8, device="cuda")
        contestant.backward = lambda: backward.run(scratch.data_ptr(), torch.cuda.current_stream().cuda_stream)
        contestant.gradients = lambda: gradients
    return contestant


def backward_of(torch, forward, q, k, v, grad_out):
    """The backward of a PyTorch contestant, alone. Autograd runs a node on the stream of its forward: each stream that it is
    called on gets a forward of its own."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    outputs, gradients = {}, []

    def run():
        stream = torch.cuda.current_stream().cuda_stream
        if stream not in outputs:
            with torch.enable_grad():
                outputs[stream] = forward(*leaves)
        gradients[:] = torch.autograd.grad(outputs[stream], leaves, grad_out, retain_graph=True)

    return run, lambda: gradients


def peer(torch, name, mod_name, mod, q, k, v, grad_out, options):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    if name in SDPA:
        if mod_name not in ("noop", "causal"):
            return None
        backend, attend = getattr(SDPBackend, SDPA[name]), torch.nn.functional.scaled_dot_product_attention

        def forward(q, k, v):
            with sdpa_kernel(backend):
                return attend(q, k, v, is_causal=mod_name == "causal")
    else:
        blocks = name == "flex_blockmask"
        if blocks and mod.mask is None:
            return None
        compiled = torch.compile(flex_attention, dynamic=False, **options)
        arguments = dict(score_mod=mod.score) if not blocks else dict(
            block_mask=create_block_mask(mod.mask, None, None, q.shape[2], k.shape[2], device="cuda"))

        def forward(q, k, v):
            return compiled(q, k, v, **arguments)

    def run():
        return forward(q, k, v)

    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    contestant = Contestant(run, run, time.perf_counter() - begin)
    if grad_out is not None:
        contestant.backward, contestant.gradients = backward_of(torch, forward, q, k, v, grad_out)
    return contestant


class Repeated:
    """Calls of a contestant behind one another: a CUDA graph of them, or a loop."""

    def __init__(self, torch, call, fill_ms):
        self.torch, self.call, self.graph, self.count = torch, call, None, 4
        self.begin, self.end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.stream = torch.cuda.Stream()
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        self.sample()
        self.count = max(2, min(400, math.ceil(fill_ms * 1e3 / self.sample())))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for _ in range(self.count):
                    call()
            self.graph = graph
        except RuntimeError:
            torch.cuda.synchronize()
        self.sample()

    def sample(self):
        """Microseconds of a call."""
        with self.torch.cuda.stream(self.stream):
            self.begin.record()
            if self.graph is not None:
                self.graph.replay()
            else:
                for _ in range(self.count):
                    self.call()
            self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) * 1e3 / self.count


def host_us(torch, call, count=100):
    """CPU time of one asynchronous call from Python, the least of a few groups."""
    best = math.inf
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, time.perf_counter() - begin)
    torch.cuda.synchronize()
    return best / count * 1e6


def check(torch, mod, dtype, q, k, v, results, rows=8):
    """name -> of_bound. Rows are compared in float64, a batch at a time."""
    batch, heads, seqlen, width = q.shape
    generator = torch.Generator().manual_seed(7)
    chosen = torch.cat([torch.tensor([0, seqlen - 1]), torch.randint(0, seqlen, (rows,), generator=generator)]).cuda()
    i = chosen.view(1, -1, 1)
    j = torch.arange(seqlen, device="cuda").view(1, 1, -1)
    h = torch.arange(heads, device="cuda").view(-1, 1, 1)
    worst = dict.fromkeys(results, 0.0)
    for b in range(batch):
        scores = q[b][:, chosen].double() @ k[b].double().transpose(1, 2) / math.sqrt(width)
        p = torch.softmax(mod.score(scores, b, h, i, j).double(), dim=-1)
        right = p @ v[b].double()
        mass = p @ v[b].double().abs()
        # Scores of `rel` reach thousands: their float32 rounding moves p.
        bound = (4 * UNIT[dtype] + 8 * 2.0 ** -24 * seqlen) * mass + 1e-6
        for name, result in results.items():
            ratio = (result[b][:, chosen].double() - right).abs() / bound
            worst[name] = max(worst[name], torch.nan_to_num(ratio, nan=math.inf).max().item())
    return worst


def check_gradients(torch, mod, dtype, q, k, v, grad_out, results):
    """name -> of_bound, from one head of each batch; `results`: name -> (dq, dk, dv), of a head each for every head of q."""
    batch, heads, seqlen, width = q.shape
    i, j = torch.arange(seqlen, device="cuda").view(-1, 1), torch.arange(seqlen, device="cuda").view(1, -1)
    worst = dict.fromkeys(results, 0.0)
    for b in range(batch):
        h = (5 * b + 3) % heads
        leaves = [t[b, h].double().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            scores = mod.score(leaves[0] @ leaves[1].T / math.sqrt(width), b, torch.tensor(h, device="cuda"), i, j)
            o = torch.softmax(scores, dim=-1) @ leaves[2]
            right = torch.autograd.grad(o, leaves, grad_out[b, h].double())
        for name, gradients in results.items():
            for gradient, gold in zip(gradients, right):
                error = (gradient[b, h].double() - gold).norm() / gold.norm() / (4 * UNIT[dtype])
                worst[name] = max(worst[name], torch.nan_to_num(error, nan=math.inf).item())
    return worst


def measure(torch, library, problem, mod_name, args):
    batch, heads, heads_kv, seqlen, width = problem
    dtype = getattr(torch, args.dtype)
    cell = dict(mod=mod_name, b=batch, h=heads, hkv=heads_kv, s=seqlen, d=width, dtype=args.dtype)

    def normal(n):
        return torch.randn(batch, seqlen, n, width, device="cuda", dtype=dtype).transpose(1, 2)

    q, k, v = normal(heads), normal(heads_kv), normal(heads_kv)
    grad_out = normal(heads) if args.backward else None
    repeat = heads // heads_kv  # PyTorch's contestants get K and V repeated
    k_peer, v_peer = [t if repeat == 1 else t.repeat_interleave(repeat, dim=1) for t in (k, v)]
    mod = make_mod(torch, mod_name, batch, heads, seqlen, dtype)
    torch._dynamo.reset()
    contestants, rows = {}, []

    def fail(name, error):
        rows.append(dict(cell, name=name, error=str(error).strip().splitlines()[0][:200]))

    options = dict(mode="max-autotune-no-cudagraphs") if args.max_autotune else {}
    entries = [(f"attnjit-{b}", lambda b=b: ours(torch, library, b, mod, q, k, v, grad_out, args)) for b in args.backends]
    if args.beside_noop and mod_name != "noop":
        noop = make_mod(torch, "noop", batch, heads, seqlen, dtype)
        entries.append((NOOP, lambda: ours(torch, library, args.backends[0], noop, q, k, v, None, args)))
    entries += [(p, lambda p=p: peer(torch, p, mod_name, mod, q, k_peer, v_peer, grad_out, options)) for p in args.peers]
    with torch.no_grad():
        for name, make in entries:
            try:
                if (contestant := make()) is not None:
                    contestants[name] = contestant
            except (RuntimeError, TypeError) as error:  # AttnjitError, out of memory, "no available kernel"
                fail(name, error)

        def timed(functions):
            """name -> microseconds of each sample, and whether it was captured; the contestants in turn."""
            repeated = {}
            for name, function in functions.items():
                try:
                    repeated[name] = Repeated(torch, function, args.fill_ms)
                except RuntimeError as error:
                    fail(name, error)
            samples = {name: [] for name in repeated}
            for _ in range(args.rounds):
                for name, calls in repeated.items():
                    samples[name].append(calls.sample())
            return {name: (samples[name], repeated[name].graph is not None) for name in repeated}

        forward = timed({name: c.call for name, c in contestants.items()})
        beside, _ = forward.pop(NOOP, (None, None))
        contestants = {name: contestants[name] for name in forward}
        backward = timed({name: c.backward for name, c in contestants.items() if c.backward})
        of_bound = check(torch, mod, args.dtype, q, k_peer, v_peer, {n: c.result() for n, c in contestants.items()})
        bwd_of_bound = {}
        if args.backward and repeat == 1:
            bwd_of_bound = check_gradients(torch, mod, args.dtype, q, k, v, grad_out,
                                           {n: c.gradients() for n, c in contestants.items() if n in backward})
        flop = 4 * batch * heads * seqlen * seqlen * width
        for name, contestant in contestants.items():
            samples, graph = forward[name]
            quartiles = statistics.quantiles(samples, n=4)
            us = statistics.median(samples)
            row = dict(cell, name=name, us=round(us, 2), spread=round(quartiles[2] - quartiles[0], 2),
                       tflops=round(flop / us / 1e6, 1), graph=graph, of_bound=round(of_bound[name], 3),
                       right=of_bound[name] <= 1.0, first_call_s=round(contestant.first_call_s, 4), **contestant.info)
            if beside:
                row["over_noop"] = round(us / statistics.median(beside), 4)
            if name in backward:
                samples, graph = backward[name]
                quartiles = statistics.quantiles(samples, n=4)
                us = statistics.median(samples)
                row.update(bwd_us=round(us, 2), bwd_spread=round(quartiles[2] - quartiles[0], 2),
                           bwd_tflops=round(2.5 * flop / us / 1e6, 1), bwd_graph=graph)
                if name in bwd_of_bound:
                    row.update(bwd_of_bound=round(bwd_of_bound[name], 3),
                               right=row["right"] and bwd_of_bound[name] <= 1.0)
            if args.host:
                row["host_us"] = round(host_us(torch, contestant.call), 2)
            rows.append(row)
    return rows


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(ratios, digits=3, end_digits=2):
    """"mean [least..most]", of none "-"."""
    if not ratios:
        return "-"
    return f"{geometric_mean(ratios):.{digits}f} [{min(ratios):.{end_digits}f}..{max(ratios):.{end_digits}f}]"


def is_ours(row):
    return row["name"].startswith("attnjit-")


def print_tables(rows, names, base, field="us"):
    """`field`: "us" or "bwd_us"."""
    cells, failed = {}, []
    for row in rows:
        key = tuple(row[f] for f in ("mod", "d", "s", "b"))
        cells.setdefault(key, {})
        if "error" in row:
            failed.append(f"failed: {row['name']} {key}: {row['error']}")
            continue
        if not row["right"]:
            verdict = "WRONG" if is_ours(row) else "beyond the bound"
            bounds = [str(row[bound]) for bound in ("of_bound", "bwd_of_bound") if bound in row]
            failed.append(f"{verdict}: {row['name']} {key}: {', '.join(bounds)} of the bound")
        if field in row and (row["right"] or not is_ours(row)):
            cells[key][row["name"]] = row[field]
    what = "backward" if field == "bwd_us" else "forward"
    print(f"\nGPU time of a call, {what}, in microseconds (- is not there, or wrong)\n")
    print("| mod | d | S | B | " + " | ".join(names) + " |")
    print("|---|---|---|---|" + "---|" * len(names))
    for key, times in sorted(cells.items(), key=lambda item: tuple(map(str, item[0][:1])) + item[0][1:]):
        print("| " + " | ".join(map(str, key)) + " | "
              + " | ".join(f"{times[n]:.1f}" if n in times else "-" for n in names) + " |")
    mods = list(dict.fromkeys(key[0] for key in cells))
    if any(base in times for times in cells.values()):
        print(f"\nSpeed of {base} over each, geometric mean and [least..most] over the cells\n")
        print("| mod | d | " + " | ".join(n for n in names if n != base) + " |")
        print("|---|---|" + "---|" * (len(names) - 1))
        for mod, d in itertools.product(mods, sorted({key[1] for key in cells})):
            fields = []
            for name in (n for n in names if n != base):
                ratios = [t[name] / t[base] for key, t in cells.items() if key[:2] == (mod, d) and name in t and base in t]
                fields.append(summary(ratios, 2))
            print(f"| {mod} | {d} | " + " | ".join(fields) + " |")
        fields = []
        for name in (n for n in names if n != base):
            ratios = [t[name] / t[base] for t in cells.values() if name in t and base in t]
            fields.append(summary(ratios))
        print("| all | | " + " | ".join(fields) + " |")
    if "noop" in mods and len(mods) > 1:
        print("\nTime over noop of the same shape, geometric mean\n")
        print("| mod | " + " | ".join(names) + " |")
        print("|---|" + "---|" * len(names))
        for mod in (m for m in mods if m != "noop"):
            fields = []
            for name in names:
                ratios = [t[name] / cells["noop", *key[1:]][name] for key, t in cells.items()
                          if key[0] == mod and name in t and name in cells.get(("noop", *key[1:]), {})]
                fields.append(f"{geometric_mean(ratios):.3f}" if ratios else "-")
            print(f"| {mod} | " + " | ".join(fields) + " |")
    beside = [row for row in rows if "over_noop" in row and row["right"]]
    if beside and field == "us":
        print("\nTime over noop in the same turns, geometric mean and [least..most] over S and B\n")
        print("| mod | d | " + " | ".join(names) + " |")
        print("|---|---|" + "---|" * len(names))
        for mod, d in dict.fromkeys((row["mod"], row["d"]) for row in beside):
            fields = []
            for name in names:
                ratios = [row["over_noop"] for row in beside if (row["mod"], row["d"], row["name"]) == (mod, d, name)]
                fields.append(summary(ratios, 3, 3))
            print(f"| {mod} | {d} | " + " | ".join(fields) + " |")
    print()
    print("\n".join(failed) or "Every contestant ran and is right.")


def parse_arguments():
    here = pathlib.Path(__file__).resolve().parent
    default = os.environ.get("ATTNJIT_LIBRARY") or here.parent / "lib" / "libattnjit.so"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--library", default=default, help="libattnjit.so (default: %(default)s)")
    p.add_argument("--backends", nargs="*", default=["sm80", "math"], choices=["sm90", "sm80", "math"], help="of attnjit")
    p.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    p.add_argument("--mods", nargs="+", default=["noop", "causal", "rel", "head_bias"], choices=MODS)
    p.add_argument("-b", type=int, nargs="+", default=[2, 8, 16])
    p.add_argument("-nh", nargs="+", default=["16"], help="heads, or query,key/value heads")
    p.add_argument("-s", type=int, nargs="+", default=[512, 1024, 4096])
    p.add_argument("-d", type=int, nargs="+", default=[64, 128])
    p.add_argument("--dtype", default="bfloat16", choices=list(UNIT))
    p.add_argument("--backward", action="store_true", help="the backward, too")
    p.add_argument("--deterministic", action="store_true", help="of attnjit's backward")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--fill-ms", type=float, default=4.0, help="GPU time of one sample")
    p.add_argument("--host", action="store_true", help="also the CPU time of a call from Python")
    p.add_argument("--max-autotune", action="store_true", help="of attnjit and FlexAttention")
    p.add_argument("--beside-noop", action="store_true", help="the first backend's noop in turns with every other mod")
    p.add_argument("--base", default="attnjit-sm80", help="whose speed over the others is shown")
    p.add_argument("--time-limit", type=float, default=math.inf, help="seconds after which no further problem is begun")
    p.add_argument("--output", help="file for the JSON rows, beside standard output")
    return p.parse_args()


def main():
    args = parse_arguments()
    try:
        import torch
    except ImportError:
        print("peers.py: skipped: there is no PyTorch", file=sys.stderr)
        return 77
    if not torch.cuda.is_available():
        print("peers.py: skipped: PyTorch sees no GPU", file=sys.stderr)
        return 77
    torch.manual_seed(1)
    torch._dynamo.config.cache_size_limit = 1000
    library = attnjit.Library(args.library)
    print(json.dumps(dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, cuda=torch.version.cuda,
                          attnjit=library.version().decode())), flush=True)
    rows, skipped, begin = [], 0, time.monotonic()
    output = open(args.output, "w") if args.output else None
    # Mods innermost, so that a run that ends early has compared all of them on the shapes it reached.
    for d, s, b, heads, mod in itertools.product(args.d, args.s, args.b, args.nh, args.mods):
        if time.monotonic() - begin > args.time_limit:
            skipped += 1
            continue
        heads_q, _, heads_kv = heads.partition(",")
        for row in measure(torch, library, (b, int(heads_q), int(heads_kv or heads_q), s, d), mod, args):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if output:
                print(json.dumps(row), file=output, flush=True)
    names = [*(f"attnjit-{b}" for b in args.backends), *args.peers]
    print_tables(rows, names, args.base)
    if args.backward:
        print_tables(rows, names, args.base, "bwd_us")
    if skipped:
        print(f"{skipped} problems were left out after {args.time_limit:.0f} s.")
    return 0 if all(row.get("right", False) for row in rows if is_ours(row)) else 1


if __name__ == "__main__":
    sys.exit(main())
