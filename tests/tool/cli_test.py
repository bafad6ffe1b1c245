"""Runs the attnjit tool from outside: results against attention in plain Python, exit codes, messages, hostile files."""

import csv
import io
import json
import math
import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
import unittest

TOOL = sys.argv.pop(1)
# A library that makes fused results wrong, where the build has one.
WRONG_RESULT = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
FORMATS = {"F32": "f", "I32": "i", "I64": "q", "U8": "B", "BOOL": "B", "F64": "d", "F16": "e"}


def pack(dtype, values):
    if dtype == "BF16":
        # Truncation is exact for the values that the tests use.
        return b"".join(struct.pack("<f", v)[2:] for v in values)
    return struct.pack("<%d%s" % (len(values), FORMATS[dtype]), *values)


def unpack(dtype, data):
    if dtype == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[i:i + 2])[0] for i in range(0, len(data), 2)]
    return list(struct.unpack("<%d%s" % (len(data) // struct.calcsize(FORMATS[dtype]), FORMATS[dtype]), data))


def write_safetensors(path, tensors):
    """tensors: name -> (dtype, shape, flat values)."""
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        raw = pack(dtype, values)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + size])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], unpack(entry["dtype"], raw[8 + size + begin:8 + size + end]))
    return tensors, metadata


def attention(q, k, v, mod, scale=None):
    """q, k, v as (dtype, shape, values); mod(score, b, h, i, j) gives the modified score, -inf where dropped."""
    (batch, heads, rows, dim), (_, heads_kv, cols, _) = q[1], k[1]
    dim_v = v[1][3]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    o, lse = [], []
    for b in range(batch):
        for h in range(heads):
            kv = b * heads_kv + h // (heads // heads_kv)
            for i in range(rows):
                row = q[2][((b * heads + h) * rows + i) * dim:][:dim]
                scores = [mod(scale * sum(x * y for x, y in zip(row, k[2][(kv * cols + j) * dim:][:dim])), b, h, i, j)
                          for j in range(cols)]
                top = max(scores)
                if top == -math.inf:
                    o += [0.0] * dim_v
                    lse.append(-math.inf)
                    continue
                p = [math.exp(s - top) for s in scores]
                total = sum(p)
                lse.append(top + math.log(total))
                for d in range(dim_v):
                    o.append(sum(p[j] * v[2][(kv * cols + j) * dim_v + d] for j in range(cols)) / total)
    return o, lse


class Tool(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = pathlib.Path(self.folder.name)
        self.random = random.Random(1)

    def tearDown(self):
        self.folder.cleanup()

    def tool(self, *arguments, code=0, env=None):
        done = subprocess.run([TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=300,
                              env={**os.environ, **(env or {})})
        self.assertEqual(done.returncode, code, f"{arguments}\n{done.stdout}\n{done.stderr}")
        if code != 0 and not done.stdout:
            self.assertTrue(done.stderr.startswith("attnjit: error: "), done.stderr)
        return done.stdout if code == 0 else done.stderr

    def values(self, *shape):
        # Exact in every type.
        return [self.random.randrange(-16, 17) / 8 for _ in range(math.prod(shape))]

    def problem(self, dtype="F32", batch=2, heads=4, heads_kv=2, rows=5, cols=7, dim=8, dim_v=6):
        return {"q": (dtype, [batch, heads, rows, dim], self.values(batch, heads, rows, dim)),
                "k": (dtype, [batch, heads_kv, cols, dim], self.values(batch, heads_kv, cols, dim)),
                "v": (dtype, [batch, heads_kv, cols, dim_v], self.values(batch, heads_kv, cols, dim_v))}

    def run_file(self, tensors, *arguments, code=0):
        write_safetensors(self.path / "in", tensors)
        text = self.tool("run", "--input", self.path / "in", "--output", self.path / "out", *arguments, code=code)
        return text if code else read_safetensors(self.path / "out")

    def assert_attention(self, tensors, result, mod, tolerance, scale=None):
        o, lse = attention(tensors["q"], tensors["k"], tensors["v"], mod, scale)
        self.assertEqual(result["o"][0], tensors["q"][0])
        self.assertEqual(result["o"][1], tensors["q"][1][:3] + [tensors["v"][1][3]])
        self.assertEqual(result["lse"][:2], ("F32", tensors["q"][1][:3]))
        for name, gold in (("o", o), ("lse", lse)):
            self.assertEqual(len(result[name][2]), len(gold))
            for i, (value, expected) in enumerate(zip(result[name][2], gold)):
                if math.isinf(expected):
                    self.assertEqual(value, expected, f"{name}[{i}]")
                else:
                    self.assertLessEqual(abs(value - expected), tolerance * max(1, abs(expected)), f"{name}[{i}]")


class Run(Tool):
    def test_mods_types_and_backends(self):
        causal = lambda s, b, h, i, j: s if i >= j else -math.inf
        for backend in ("auto", "cpu", "math"):
            for dtype, tolerance in (("F32", 1e-5), ("F16", 4e-3), ("BF16", 3e-2)):
                with self.subTest(backend=backend, dtype=dtype):
                    tensors = self.problem(dtype)
                    result, metadata = self.run_file(tensors, "--score-mod", "causal", "--backend", backend)
                    self.assert_attention(tensors, result, causal, tolerance)
                    self.assertEqual(metadata["score_mod"], "causal")
                    self.assertIn(metadata["backend"], ("cpu", "math"))
                    if backend != "auto":
                        self.assertEqual(metadata["backend"], backend)

    def test_captured_tensors_mask_and_scale(self):
        tensors = self.problem()
        tensors["slopes"] = ("F32", [4], [0.5, 0.25, 0.125, 1.0])
        tensors["keep"] = ("BOOL", [2, 7], [self.random.randrange(2) for _ in range(14)])
        tensors["shift"] = ("I64", [], [3])
        tensors["unused"] = ("F64", [2], [1.0, 2.0])
        slopes, keep = tensors["slopes"][2], tensors["keep"][2]

        def mod(s, b, h, i, j):
            return s + slopes[h] * (j - i + 3) if keep[b * 7 + j] else -math.inf

        result, metadata = self.run_file(tensors, "--score-mod", "score + slopes[h] * (kv_idx - q_idx + shift)",
                                         "--mask-mod", "keep[b, kv_idx]", "--scale", "0.5")
        self.assert_attention(tensors, result, mod, 1e-5, scale=0.5)
        self.assertEqual(metadata["mask_mod"], "keep[b, kv_idx]")
        self.assertEqual(float(metadata["scale"]), 0.5)

    def with_gradients_in(self, tensors, lse=True):
        shape = tensors["q"][1][:3]
        tensors["grad_out"] = (tensors["q"][0], [*shape, tensors["v"][1][3]], self.values(*shape, tensors["v"][1][3]))
        if lse:
            tensors["grad_lse"] = ("F32", shape, self.values(*shape))
        return tensors

    def assert_gradients(self, tensors, result, mod, wanted, tolerance=1e-4):
        """Some elements of each gradient against central differences; mod(tensors) gives attention()'s."""

        def loss(given):
            o, lse = attention(given["q"], given["k"], given["v"], mod(given))
            total = sum(x * y for x, y in zip(o, given["grad_out"][2]))
            return total + sum(x * y for x, y in zip(lse, given.get("grad_lse", (0, 0, []))[2]) if x != -math.inf)

        for name, gradient in wanted.items():
            dtype, shape, values = tensors[name]
            self.assertEqual(result[gradient][:2], (dtype, shape))
            for at in self.random.sample(range(len(values)), min(len(values), 6)):
                step, sides = 1e-4, []
                for sign in (1, -1):
                    moved = list(values)
                    moved[at] += sign * step
                    sides.append(loss({**tensors, name: (dtype, shape, moved)}))
                expected = (sides[0] - sides[1]) / (2 * step)
                self.assertLessEqual(abs(result[gradient][2][at] - expected), tolerance * max(1, abs(expected)),
                                     f"{gradient}[{at}]: {result[gradient][2][at]}, by differences {expected}")

    def test_backward(self):
        for backend in ("cpu", "math"):
            with self.subTest(backend=backend):
                tensors = self.with_gradients_in(self.problem())
                tensors["table"] = ("F32", [4, 12], self.values(4, 12))
                tensors["gain"] = ("F32", [], [0.75])
                tensors["shift"] = ("F32", [5], self.values(5))

                def mod(given):
                    table, gain, shift = (given[n][2] for n in ("table", "gain", "shift"))
                    return lambda s, b, h, i, j: (s * gain[0] + table[h * 12 + i - j + 6] + shift[i] if i + 2 >= j
                                                  else -math.inf)

                result, _ = self.run_file(
                    tensors, "--score-mod", "where(q_idx + 2 >= kv_idx, score * gain + table[h, q_idx - kv_idx + 6] + "
                    "shift[q_idx], -inf)", "--backend", backend, "--backward", "--grad", "table,gain", "--grad", "shift")
                self.assert_gradients(tensors, result, mod, {"q": "dq", "k": "dk", "v": "dv", "table": "d_table",
                                                             "gain": "d_gain", "shift": "d_shift"})

    def test_backward_without_captured_gradients(self):
        tensors = self.with_gradients_in(self.problem(), lse=False)
        tensors["shift"] = ("F32", [5], self.values(5))
        arguments = ["--score-mod", "tanh(score) + shift[q_idx]", "--backward"]
        result, _ = self.run_file(tensors, *arguments)
        self.assertEqual(sorted(result), ["dk", "dq", "dv", "lse", "o"])
        mod = lambda given: lambda s, b, h, i, j: math.tanh(s) + given["shift"][2][i]
        self.assert_gradients(tensors, result, mod, {"q": "dq", "k": "dk", "v": "dv"})
        # Softmax does not see what moves a whole row.
        result, _ = self.run_file(tensors, *arguments, "--grad", "shift", "--deterministic")
        self.assertEqual(result["d_shift"], ("F32", [5], [0.0] * 5))

    def test_partial_keys(self):
        def keys(tensor, begin, end):
            dtype, (batch, heads, rows, dim), values = tensor
            return (dtype, [batch, heads, end - begin, dim],
                    [x for head in range(batch * heads) for x in values[(head * rows + begin) * dim:][:(end - begin) * dim]])

        tensors = self.with_gradients_in(self.problem())
        tensors["table"] = ("F32", [4, 7], self.values(4, 7))
        tensors["shift"] = ("F32", [5], self.values(5))
        tensors["first"] = ("I32", [], [0])
        arguments = ["--score-mod", "where(q_idx >= kv_idx + first, score + table[h, kv_idx + first] + shift[q_idx], -inf)",
                     "--backward", "--grad", "table,shift"]
        for backend in ("cpu", "math"):
            with self.subTest(backend=backend):
                whole, _ = self.run_file(tensors, *arguments, "--backend", backend)
                total = {name: [0.0] * len(whole[name][2]) for name in ("dq", "d_table", "d_shift")}
                for begin, end in ((0, 3), (3, 7)):
                    part = {**tensors, "o": whole["o"], "lse": whole["lse"], "first": ("I32", [], [begin]),
                            **{name: keys(tensors[name], begin, end) for name in "kv"}}
                    result, metadata = self.run_file(part, *arguments, "--backend", backend, "--partial-keys")
                    self.assertEqual(sorted(result), ["d_shift", "d_table", "dk", "dq", "dv"])
                    self.assertEqual(metadata["backend"], backend)
                    for name, sums in total.items():
                        total[name] = [x + y for x, y in zip(sums, result[name][2], strict=True)]
                    for name in ("dk", "dv"):
                        expected = keys(whole[name], begin, end)
                        self.assertEqual(result[name][1], expected[1])
                        for x, y in zip(result[name][2], expected[2], strict=True):
                            self.assertAlmostEqual(x, y, places=4)
                for name, sums in total.items():
                    self.assertGreater(max(map(abs, sums)), 0.1)
                    for x, y in zip(sums, whole[name][2], strict=True):
                        self.assertAlmostEqual(x, y, places=4)

    def test_the_users_faults_in_the_backward(self):
        tensors = self.with_gradients_in(self.problem())
        tensors["ids"] = ("I32", [7], list(range(7)))
        tensors["bias"] = ("F32", [4], [1.0] * 4)
        without = {n: t for n, t in tensors.items() if n != "grad_out"}
        short = {**tensors, "grad_out": ("F32", [2, 4, 5, 5], self.values(2, 4, 5, 5))}
        mod = ["--score-mod", "score + bias[h] + ids[kv_idx]"]
        partial = {**tensors, "o": ("F32", [2, 4, 5, 6], self.values(2, 4, 5, 6)), "lse": ("F32", [2, 4, 5], [9.0] * 40)}
        no_lse = {n: t for n, t in partial.items() if n != "lse"}
        for given, arguments, expected in [
                (without, ["--backward"], ["no tensor 'grad_out'", "gradient of o"]),
                (short, ["--backward"], ["grad_out", "(2, 4, 5, 5)", "(2, 4, 5, 6)"]),
                (tensors, ["--grad", "bias", *mod], ["--grad", "--backward"]),
                (tensors, ["--deterministic"], ["--deterministic", "--backward"]),
                (partial, ["--partial-keys"], ["--partial-keys", "--backward"]),
                (tensors, ["--backward", "--partial-keys"], ["no tensor 'o'", "for --partial-keys"]),
                (no_lse, ["--backward", "--partial-keys"], ["no tensor 'lse'", "for --partial-keys"]),
                ({**partial, "lse": ("F32", [2, 4, 4], [9.0] * 32)}, ["--backward", "--partial-keys"],
                 ["lse", "(2, 4, 4)", "(2, 4, 5)"]),
                ({**partial, "o": ("F16",) + partial["o"][1:]}, ["--backward", "--partial-keys"], ["o", "float16"]),
                (tensors, ["--backward", "--grad", "bia", *mod], ["'bia'", "'bias', 'ids'"]),
                (tensors, ["--backward", "--grad", "ids", *mod], ["ids", "int32"]),
                (tensors, ["--backward", "--grad", "bias,bias", *mod], ["bias", "twice"])]:
            with self.subTest(arguments=arguments, expected=expected):
                message = self.run_file(given, *arguments, code=1)
                for part in expected:
                    self.assertIn(part, message)
                self.assertFalse((self.path / "out").exists())

    def test_fully_masked_rows(self):
        tensors = self.problem()
        result, _ = self.run_file(tensors, "--mask-mod", "q_idx > 2")
        self.assert_attention(tensors, result, lambda s, b, h, i, j: s if i > 2 else -math.inf, 1e-5)

    def test_score_mod_file(self):
        tensors = self.problem()
        mod = self.path / "my.mod"
        mod.write_text("let distance = q_idx - kv_idx;\nscore - 0.5 * abs(distance)\n")
        result, _ = self.run_file(tensors, "--score-mod-file", mod)
        self.assert_attention(tensors, result, lambda s, b, h, i, j: s - 0.5 * abs(i - j), 1e-5)

    def test_the_users_faults(self):
        tensors = self.problem()
        float64 = {**tensors, "q": ("F64",) + tensors["q"][1:]}
        bias64 = {**tensors, "bias": ("F64", [4], [1.0] * 4)}
        no_k = {name: tensors[name] for name in "qv"}
        flat = {**tensors, "q": ("F32", [2, 4, 40], tensors["q"][2])}
        mixed = {**tensors, "k": ("F16",) + tensors["k"][1:]}
        heads = {**tensors, **{n: ("F32", [2, 3, 7, d], self.values(2, 3, 7, d)) for n, d in (("k", 8), ("v", 6))}}
        cases = [
            (float64, [], ["'q'", "float64", "float32"]),
            (bias64, ["--score-mod", "score + bias[h]"], ["'bias'", "float64", "float32"]),
            (no_k, [], ["no tensor 'k'", "'q', 'v'"]),
            (tensors, ["--score-mod", "score + bias[h]"], ["no tensor 'bias'", "captured"]),
            (flat, [], ["q has shape (2, 4, 40)", "4 dimensions"]),
            (mixed, [], ["k", "float16", "float32"]),
            (heads, [], ["3", "4"]),
            (tensors, ["--score-mod", "scor + 1"], ["scor"]),
            (tensors, ["--score-mod", "score + "], ["score + ", "^"]),
            (tensors, ["--mask-mod", "score > 0"], ["score"]),
            (tensors, ["--backend", "gpu"], ["'gpu'", "auto, sm90, sm80, math and cpu"]),
            (tensors, ["--device", "tpu"], ["'tpu'", "auto, cpu and cuda"]),
            (tensors, ["--scale", "abc"], ["--scale", "abc"]),
            (tensors, ["--scale", "nan"], ["scale"]),
            (tensors, ["--nonsense"], ["--nonsense"]),
            (tensors, ["--score-mod-file", self.path / "none"], ["no file", "none"]),
            (tensors, ["--score-mod", "noop", "--score-mod-file", self.path / "in"], ["--score-mod"]),
        ]
        for given, arguments, expected in cases:
            with self.subTest(arguments=arguments, expected=expected):
                message = self.run_file(given, *arguments, code=1)
                for part in expected:
                    self.assertIn(part, message)
                self.assertFalse((self.path / "out").exists())

    def test_clamped_reads_are_reported(self):
        tensors = {**self.problem(), "t": ("F32", [3], [1, 2, 3])}
        write_safetensors(self.path / "in", tensors)
        done = subprocess.run([TOOL, "run", "--input", self.path / "in", "--output", self.path / "out", "--check-reads",
                               "--score-mod", "score + t[q_idx]"], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (0, ""), done.stderr)
        # Rows 3 and 4 of each head, and every key.
        self.assertEqual(done.stderr, f"attnjit: warning: 't': {2 * 4 * 2 * 7} indices of dimension 0 are outside [0, 3) "
                         "and were clamped, the first, 3, at b=0 h=0 q_idx=3 kv_idx=0\n")
        self.assertTrue((self.path / "out").exists())

    def test_no_cuda_in_this_build(self):
        self.assertIn("there is no GPU to use", self.run_file(self.problem(), "--device", "cuda", code=2))

    def test_paths(self):
        write_safetensors(self.path / "in", self.problem())
        arguments = ["run", "--input", self.path / "in", "--output"]
        self.assertIn("is the input", self.tool(*arguments, self.path / "in", code=1))
        self.assertIn("not a regular file", self.tool(*arguments, "/dev/null", code=1))
        self.assertIn("cannot create", self.tool(*arguments, self.path / "no" / "out", code=2))
        self.assertIn("No such file", self.tool("run", "--input", self.path / "x", "--output", self.path / "y", code=1))
        # A failed call leaves what was there.
        (self.path / "out").write_text("old")
        self.tool(*arguments, self.path / "out", "--score-mod", "1 +", code=1)
        self.assertEqual((self.path / "out").read_text(), "old")
        self.assertEqual(sorted(p.name for p in self.path.iterdir()), ["in", "out"])

    def test_hostile_files_are_refused(self):
        write_safetensors(self.path / "good", self.problem())
        good = (self.path / "good").read_bytes()
        (size,) = struct.unpack("<Q", good[:8])
        huge = json.dumps({n: {"dtype": "F32", "shape": [2 ** 30, 2 ** 20, 2 ** 10, 0], "data_offsets": [0, 0]}
                           for n in "qkv"}).encode()
        cases = [b"", good[:4], good[:8], good[:size], good[:-1], good + b"\0", b"\xff" * 64,
                 struct.pack("<Q", 2 ** 63) + good[8:], struct.pack("<Q", size - 1) + good[8:],
                 struct.pack("<Q", 200_000) + b"[" * 200_000, good.replace(b"F32", b"F99"),
                 good.replace(b'"v"', b'"k"'), struct.pack("<Q", len(huge)) + huge]
        for i, data in enumerate(cases):
            with self.subTest(case=i):
                (self.path / "in").write_bytes(data)
                message = self.tool("run", "--input", self.path / "in", "--output", self.path / "out", code=1)
                self.assertLess(len(message), 1000)


class Explain(Tool):
    def test_text(self):
        text = self.tool("explain", "softcap(30)")
        for part in ("score_mod", "tanh(score / 30)", "hash", "nonlinear", "compile"):
            self.assertIn(part, text)

    def test_json_and_hash(self):
        first, second, other = (json.loads(self.tool("explain", e, "--format", "json"))
                                for e in ("score + 2 * h", "h * 2 + score", "score + 3 * h"))
        self.assertEqual(first["hash"], second["hash"])
        self.assertNotEqual(first["hash"], other["hash"])
        self.assertNotIn("mlir", first)

    def test_dump(self):
        text = self.tool("explain", "score * 2", "--dump", "mlir,llvm", "--dump", "asm")
        for part in ("---- mlir ----", "---- llvm ----", "---- asm ----", "define "):
            self.assertIn(part, text)
        only = self.tool("explain", "score * 2", "--dump", "mlir")
        self.assertNotIn("---- llvm", only)
        self.assertIn("---- mlir", only)

    def test_captured_tensors(self):
        shape = ["--shape", "2,8,100,8,200,64"]
        inferred = json.loads(self.tool("explain", "alibi", *shape, "--format", "json"))
        self.assertEqual([(c["dtype"], c["shape"]) for c in inferred["captures"]], [("float32", [8])])
        given = json.loads(self.tool("explain", "document(ids)", *shape, "--captures", "ids:int32:Skv", "--format", "json"))
        self.assertEqual([(c["name"], c["dtype"], c["shape"]) for c in given["captures"]], [("ids", "int32", [200])])
        scalar = json.loads(self.tool("explain", "score * t", "--captures", "t:float16:=3", "--format", "json"))
        self.assertEqual(scalar["captures"][0]["shape"], [])

    def test_backward(self):
        def explain(*arguments):
            return json.loads(self.tool("explain", *arguments, "--format", "json"))

        facts = explain("score + bias[h, q_idx - kv_idx + 100]", "--captures", "bias:float32:16,201",
                        "--shape", "2,16,100,16,100,64", "--backward", "--grad", "bias")["facts"]
        self.assertEqual(facts["gradient_need"], "nothing")
        self.assertEqual([(s["capture"], s["level"], s["row_shift"]) for s in facts["sinks"]],
                         [("bias", "diagonal", False)])
        both = explain("score * a[h] + tanh(score) * c", "--captures", "a:float32:Hq", "--captures", "c:float32:",
                       "--backward", "--grad", "c,a", "--deterministic")
        self.assertEqual(both["gradients"], {"wanted": ["dq", "dk", "dv"], "captures": ["a", "c"], "grad_lse": False,
                                             "deterministic": True, "partial_keys": False})
        self.assertEqual(both["facts"]["gradient_need"], "score")
        self.assertEqual({s["capture"] for s in both["facts"]["sinks"]}, {"a", "c"})
        self.assertNotIn("gradient_need", explain("score * 2")["facts"])
        text = self.tool("explain", "score + t[kv_idx] + u[q_idx]", "--backward", "--grad", "t,u")
        for part in ("gradient need", "capture t, level column, row shift no", "capture u, level row, row shift yes"):
            self.assertIn(part, text)
        partial = explain("score + u[q_idx]", "--backward", "--grad", "u", "--partial-keys")
        self.assertTrue(partial["gradients"]["partial_keys"])
        self.assertEqual([s["row_shift"] for s in partial["facts"]["sinks"]], [False])

    def test_explain_for_fewer_multiprocessors(self):
        def tile(**env):
            return json.loads(self.tool("explain", "noop", "--shape", "2,4,512,4,512,64", "--dtype", "bfloat16", "--arch",
                                        "sm_90", "--backend", "sm90", "--format", "json", env=env))["kernels"][0]["tile"]

        # 64 tiles of 64 queries: one to a multiprocessor, unless there are five.
        self.assertEqual(tile(), "64 x 64")
        self.assertEqual(tile(ATTNJIT_CUDA_MAX_SMS="5"), "256 x 64")

    def test_explain_counts_tiles(self):
        def tiles(expression, *arguments, shape="2,3,256,3,384,64"):
            return json.loads(self.tool("explain", expression, "--shape", shape, "--format", "json",
                                        *arguments)).get("tiles", "none")

        # Panels of 32 queries, blocks of 128 keys: of a head's 24 tiles, 8 x 3, those below, above and on the diagonal.
        self.assertEqual(tiles("causal"), {"queries": 32, "keys": 128, "skipped": 6 * 12, "full": 6 * 4, "partial": 6 * 8})
        self.assertEqual(tiles("where(kv_idx < 128 * h, score, -inf)"),
                         {"queries": 32, "keys": 128, "skipped": 2 * 8 * 6, "full": 2 * 8 * 3, "partial": 0})
        # The backward's are the same, its keys first.
        self.assertEqual(tiles("causal", "--backward"), tiles("causal"))
        self.assertEqual(tiles("where(q_idx < 96 + 32 * h, score, -inf)", "--backward"),
                         {"queries": 32, "keys": 128, "skipped": 6 * (5 + 4 + 3), "full": 6 * (3 + 4 + 5), "partial": 0})
        # Keys that do not exist are not asked about, whichever way.
        ragged = ["noop", "--mask-mod", "kv_idx < 300", "--dtype", "bfloat16"]
        for arch in [], ["--arch", "sm_80", "--backend", "sm80"]:
            for direction in [], ["--backward"]:
                counts = tiles(*ragged, *arch, *direction, shape="1,1,300,1,300,64")
                self.assertEqual((counts["skipped"], counts["partial"]), (0, 0), counts)
        # Eager kernels have no tiles.
        self.assertEqual(tiles("causal", "--arch", "sm_80", "--backend", "math"), "none")
        self.assertEqual(tiles("score * 2"), "none")
        self.assertEqual(tiles("where(score > 0, score, -inf)"), "none")
        # By tables of captured values, which the CPU makes none of.
        for arch in ["--arch", "sm_80", "--backend", "sm80"], ["--arch", "sm_90a"]:
            for direction in [], ["--backward"]:
                self.assertIsNone(tiles("where(ids[b, q_idx] == ids[b, kv_idx] and q_idx >= kv_idx, score, -inf)",
                                        "--captures", "ids:int32:B,384", "--dtype", "bfloat16", *arch, *direction))
        for direction in [], ["--backward"]:
            self.assertIsNone(tiles("where(kv_idx < ends[b], score, -inf)", "--captures", "ends:int32:B", *direction))

    def test_errors(self):
        for arguments, expected in [
                (["score + x[h]", "--grad", "x"], "--backward"),
                (["score + x[h]", "--partial-keys"], "--backward"),
                (["score + x[h]", "--backward", "--grad", "y"], "gradients.captures has 'y', which captures lacks"),
                (["score +"], "^"),
                (["score + scor"], "did you mean 'score'"),
                (["score + x[h]", "--captures", "y:float32:4"], "'y'"),
                (["score + x[h]", "--captures", "x:float64:4"], "float64"),
                (["score + x[h]", "--captures", "x:float32:4,4"], "2 dimensions"),
                (["score", "--shape", "1,2"], "B,Hq,Sq,Hkv,Skv,D"),
                (["score", "--shape", "1,3,4,2,4,8"], "3"),
                (["score", "--dump", "sass"], "ptx"),
                (["score", "--format", "xml"], "xml"),
                ([], "EXPR")]:
            with self.subTest(arguments=arguments):
                self.assertIn(expected, self.tool("explain", *arguments, code=1))


class Bench(Tool):
    SMALL = ["-b", "1", "-nh", "4,2", "-s", "64", "96", "-d", "16", "--reps", "2", "--threads", "1", "--rows", "6"]

    def test_json(self):
        report = json.loads(self.tool("bench", "score-mod", *self.SMALL, "-dtype", "float32", "-mods", "noop", "causal",
                                      "score + alibi_slopes[h] * kv_idx", "--format", "json", "--dynamic"))
        self.assertEqual(len(report["cells"]), 6)
        self.assertEqual(report["wrong"], 0)
        for cell in report["cells"]:
            self.assertTrue(cell["pass"], cell)
            self.assertEqual(cell["shape"]["heads_kv"], 2)
            self.assertGreater(cell["speedup"], 0)
            self.assertLessEqual(cell["o_of_bound"], 1)
            self.assertGreaterEqual(cell["eager_ms"]["max"], cell["eager_ms"]["median"])
            self.assertGreaterEqual(cell["eager_ms"]["median"], cell["eager_ms"]["min"])
        self.assertEqual([row["shapes"] for row in report["compile"]], [2, 2, 2])
        self.assertEqual([row["compiles"] for row in report["compile"]], [1, 1, 1])
        self.assertLessEqual(report["summary"]["min"]["speedup"], report["summary"]["max"]["speedup"])
        # The command reproduces the sweep.
        command = report["header"]["command"]
        self.assertIn("'score + alibi_slopes[h] * kv_idx'", command)
        again = subprocess.run(command.replace("attnjit", TOOL, 1), shell=True, capture_output=True, text=True)
        self.assertEqual(again.returncode, 0, again.stderr)
        cells = json.loads(again.stdout)["cells"]
        self.assertEqual([c["max_error"] for c in cells], [c["max_error"] for c in report["cells"]])

    def test_github_default_mods(self):
        text = self.tool("bench", "score-mod", *self.SMALL)
        for part in ("noop", "causal", "rel", "head_bias", "(1, 4, 64, 2, 64, 16)", "bfloat16", "Average (geometric)",
                     "Max", "Min", "All 8 cells pass"):
            self.assertIn(part, text)
        self.assertNotIn("WRONG", text)

    def test_csv_plain_to_a_file(self):
        out = self.path / "report.csv"
        self.assertEqual(self.tool("bench", "score-mod", *self.SMALL, "-mods=softcap(20)", "--baseline", "plain",
                                   "--format", "csv", "--output", out), "")
        lines = [line for line in out.read_text().splitlines() if not line.startswith("#")]
        rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
        self.assertEqual([row["score_mod"] for row in rows], ["softcap(20)"] * 2)
        self.assertEqual({row["pass"] for row in rows}, {"true"})

    @unittest.skipIf(WRONG_RESULT is None, "sanitizers are loaded first themselves")
    def test_a_wrong_result_is_shown(self):
        for wrong, expected in [("", None), ("half_percent", "the oracle has"), ("lse", "lse is"),
                                ("one_element", "the oracle has"), ("one_lse", "lse is"), ("not_written", "o[")]:
            with self.subTest(wrong=wrong):
                done = subprocess.run([TOOL, "bench", "score-mod", "-b", "1", "-nh", "2", "-s", "200", "-d", "32",
                                       "-dtype", "float32", "-mods", "noop", "causal", "--reps", "1"],
                                      env={**os.environ, "LD_PRELOAD": WRONG_RESULT, "ATTNJIT_TEST_WRONG": wrong},
                                      capture_output=True, text=True)
                self.assertEqual(done.returncode, 1 if wrong else 0, done.stderr)
                if expected:
                    self.assertIn("2 of 2 cells are WRONG", done.stdout)
                    self.assertIn(expected, done.stdout)
                    self.assertNotIn("Average", done.stdout)
                else:
                    self.assertIn("All 2 cells pass", done.stdout)

    @unittest.skipIf(WRONG_RESULT is None, "sanitizers are loaded first themselves")
    def test_a_wrong_gradient_is_shown(self):
        for wrong, expected in [("", None), ("dq_half_percent", "dq["), ("dk_scale", "dk["), ("dv_one_element", "dv["),
                                ("dk_not_written", "dk[")]:
            with self.subTest(wrong=wrong):
                done = subprocess.run([TOOL, "bench", "score-mod", "-b", "1", "-nh", "2", "-s", "200", "-d", "32",
                                       "-dtype", "float32", "-mods", "noop", "causal", "--reps", "1", "--calculate-bwd"],
                                      env={**os.environ, "LD_PRELOAD": WRONG_RESULT, "ATTNJIT_TEST_WRONG": wrong},
                                      capture_output=True, text=True)
                self.assertEqual(done.returncode, 1 if wrong else 0, done.stdout + done.stderr)
                if expected:
                    self.assertIn("2 of 2 cells are WRONG", done.stdout)
                    self.assertIn(expected, done.stdout)
                    self.assertNotIn("### Backward speedups", done.stdout)
                else:
                    self.assertIn("All 2 cells pass", done.stdout)

    def bench_cell(self, mod, *arguments, code=0):
        done = subprocess.run([TOOL, "bench", "score-mod", "-b", "1", "-nh", "1", "-d", "32", "-dtype", "float32", "-mods",
                               mod, "--reps", "1", "--format", "json", *map(str, arguments)], capture_output=True,
                              text=True)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return json.loads(done.stdout)["cells"][0]

    def test_rows_that_float32_does_not_decide_are_left_out(self):
        # Some scores are within their rounding error of a jump: where they carry little of a row, its bound grows; where
        # they carry much, the row is left out.
        cell = self.bench_cell("round(score)*3", "-s", 8192, "--rows", 200)
        self.assertTrue(cell["pass"])
        cell = self.bench_cell("round(score * 1000)", "-s", 4096, "--rows", 400, "--seed", 2)
        self.assertTrue(cell["pass"])
        self.assertGreater(cell["rows_left_out"], 0)
        self.assertLessEqual(cell["rows_left_out"], cell["rows"] // 100)
        self.assertEqual(cell["rows_without_bound"], 0)
        # Few are; were it all of them, nothing would have been shown.
        cell = self.bench_cell("floor(score * 1e7) % 2", "-s", 256, code=1)
        self.assertIn("float32 does not decide 16 of 16 sampled rows", cell["why"])
        # And nothing is left out without a reason.
        self.assertEqual(self.bench_cell("softcap(3)", "-s", 256)["rows_left_out"], 0)

    def test_rows_that_are_not_sampled_may_have_other_bounds(self):
        # The one sampled row is masked: nothing may be off in it.
        for mod in "where(q_idx > 5, score, -inf)", "where(q_idx > 5, 1000 * score, 0 * score)":
            text = self.tool("bench", "score-mod", *self.SMALL[:-1], "1", "-dtype", "float32", "-mods", mod)
            self.assertIn("All 2 cells pass", text)

    def test_no_progress_bar_without_a_terminal_or_in_ci(self):
        command = [TOOL, "bench", "score-mod", *self.SMALL, "-mods", "noop"]
        for variables, expected in [({}, True), ({"CI": "true"}, False), ({"TERM": "dumb"}, False)]:
            with self.subTest(variables=variables):
                environment = {k: v for k, v in os.environ.items() if k != "CI"}
                controller, terminal = os.openpty()
                done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=terminal,
                                      env={**environment, "TERM": "xterm", **variables})
                os.close(terminal)
                try:
                    shown = os.read(controller, 1 << 16)
                except OSError:  # nothing was written
                    shown = b""
                os.close(controller)
                self.assertEqual(done.returncode, 0)
                self.assertEqual(b"noop" in shown, expected, shown)
        done = subprocess.run(command, capture_output=True)
        self.assertEqual((done.returncode, done.stderr), (0, b""))

    def test_every_registered_kind(self):
        text = self.tool("bench", "score-mod", *self.SMALL, "-mods", "alibi", "sliding_window(16)", "prefix_lm(8)",
                         "document(ids)", "--captures", "ids:int32:Skv")
        self.assertIn("All 8 cells pass", text)

    def test_the_backward(self):
        arguments = [*self.SMALL, "-dtype", "float32", "--calculate-bwd", "-mods", "noop", "causal", "softcap(2)"]
        text = self.tool("bench", "score-mod", *arguments, "--deterministic")
        for part in ("All 6 cells pass", "bwd_speedup", "### Backward speedups", "--calculate-bwd --deterministic"):
            self.assertIn(part, text)
        report = json.loads(self.tool("bench", "score-mod", *arguments, "--format", "json"))
        for cell in report["cells"]:
            self.assertGreater(cell["backward"]["rows"], 100)
            self.assertEqual(cell["backward"]["pass"], True, cell)
        self.assertIn("--calculate-bwd", self.tool("bench", "score-mod", *self.SMALL, "--deterministic", code=1))

    def test_errors(self):
        for arguments, code, expected in [
                (["-b", "0"], 1, "0"),
                (["-nh", "16,3"], 1, "no multiple"),
                (["-mods", "noop", "scor"], 1, "scor"),
                (["-dtype", "int8"], 1, "bfloat16"),
                (["--baseline", "torch"], 1, "math"),
                (["--format", "html"], 1, "github, csv and json"),
                (["--captures", "x:float32:4"], 1, "'x'"),
                (["--captures", "x:uint8:4=-1"], 1, "uint8"),
                (["--captures", "x:int8:4=128"], 1, "int8"),
                (["--captures", "x:float32:4", "--captures", "x:int8:4"], 1, "twice"),
                (["--seed", "-1"], 1, "--seed"),
                (["-mods", "score + x[b, h, q_idx, kv_idx]", "-s", "4096", "-nh", "64"], 1, "--captures x"),
                (["-b", "1000000", "-s", "65536"], 2, "GiB for q, k, v and o"),
                (["-b", "1", "-s", "1000000"], 2, "GiB with the eager baseline's scores"),
                (["--device", "cuda"], 2, "there is no GPU to use"),
                (["--output", self.path / "no" / "file"], 2, "--output")]:
            with self.subTest(arguments=arguments):
                self.assertIn(expected, self.tool("bench", "score-mod", *arguments, code=code))


class Cache(Tool):
    # What the library writes for the key "ab12" and the payload "payload": magic, version, sizes, checksum, key, payload.
    ENTRY = bytes.fromhex("6174746e6a697400" "01000000" "04000000" "0700000000000000"
                          "ea5767566d81e97b366d1fcf70083765" "61623132" "7061796c6f6164")

    def setUp(self):
        super().setUp()
        self.cache = self.path / "cache"
        self.env = {"ATTNJIT_CACHE_DIR": str(self.cache), "ATTNJIT_DISABLE_CACHE": "", "ATTNJIT_CACHE_MAX_BYTES": ""}

    def fill(self, **entries):
        self.cache.mkdir(mode=0o700, exist_ok=True)
        for age, (key, data) in enumerate(entries.items()):
            path = self.cache / f"{key}.attnjit"
            path.write_bytes(data)
            path.chmod(0o600)
            os.utime(path, (1_700_000_000 - 3600 * age,) * 2)

    def run_cache(self, *arguments, code=0, env=None):
        return self.tool("cache", *arguments, code=code, env={**self.env, **(env or {})})

    def entries(self, *arguments):
        return json.loads(self.run_cache(*arguments, "--format", "json"))["entries"]

    def test_nothing_there(self):
        text = self.run_cache("list")
        self.assertIn("0 entries", text)
        self.assertIn(str(self.cache), text)
        self.assertEqual(self.entries("verify"), [])
        self.assertIn("removed 0 entries", self.run_cache("clear"))
        self.assertFalse(self.cache.exists(), "looking at it made it")

    def test_list(self):
        self.fill(ab12=self.ENTRY, cd="damaged".encode(), ef=bytes(3000))
        (self.cache / "notes.txt").write_text("not an entry")
        listed = json.loads(self.run_cache("list", "--format", "json"))
        self.assertEqual(listed["directory"], str(self.cache))
        self.assertEqual(listed["max_bytes"], 1 << 30)
        self.assertEqual(listed["bytes"], len(self.ENTRY) + 7 + 3000)
        self.assertEqual(listed["entries"], [{"key": "ef", "bytes": 3000, "last_used": 1_700_000_000 - 7200},
                                             {"key": "cd", "bytes": 7, "last_used": 1_700_000_000 - 3600},
                                             {"key": "ab12", "bytes": len(self.ENTRY), "last_used": 1_700_000_000}])
        text = self.run_cache("list", env={"ATTNJIT_CACHE_MAX_BYTES": "5000", "TZ": "UTC"})
        for part in ("| ab12 |", "51 B", "2.9 KiB", "2023-11-14 22:13", "3 entries", "of at most 4.9 KiB"):
            self.assertIn(part, text)

    def test_verify_removes_what_is_damaged(self):
        flipped = bytearray(self.ENTRY)
        flipped[-1] ^= 1
        self.fill(ab12=self.ENTRY, ab13=self.ENTRY, ab14=self.ENTRY[:-1], ab15=bytes(flipped))
        done = subprocess.run([TOOL, "cache", "verify"], env={**os.environ, **self.env}, capture_output=True, text=True)
        self.assertEqual(done.returncode, 2)
        self.assertIn("damaged entries in the disk cache: 3", done.stderr)
        lines = {line.split("|")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("| ab")}
        self.assertIn("whole", lines["ab12"])
        for key in ("ab13", "ab14", "ab15"):
            self.assertIn("damaged, removed", lines[key])
        self.assertEqual([p.name for p in self.cache.iterdir()], ["ab12.attnjit"])
        self.assertEqual([(e["key"], e["valid"]) for e in self.entries("verify")], [("ab12", True)])

    def test_clear(self):
        self.fill(ab12=self.ENTRY, cd=b"damaged")
        (self.cache / "notes.txt").write_text("not an entry")
        self.assertIn("removed 2 entries", self.run_cache("clear"))
        self.assertEqual([p.name for p in self.cache.iterdir()], ["notes.txt"])

    def test_no_cache_is_the_environments_fault(self):
        self.fill(ab12=self.ENTRY)
        for arguments in (["list"], ["verify"], ["clear"]):
            self.assertIn("ATTNJIT_DISABLE_CACHE", self.run_cache(*arguments, code=2, env={"ATTNJIT_DISABLE_CACHE": "1"}))
        self.cache.chmod(0o777)
        self.assertIn("others may write", self.run_cache("list", code=2))
        self.assertIn("others may write", self.run_cache("clear", code=2))
        self.cache.chmod(0o700)
        self.assertEqual([e["key"] for e in self.entries("list")], ["ab12"])
        self.assertIn("ATTNJIT_CACHE_MAX_BYTES", self.run_cache("list", code=2, env={"ATTNJIT_CACHE_MAX_BYTES": "1G"}))

    def test_the_users_faults(self):
        for arguments, expected in [([], "cache list"), (["show"], "show"), (["list", "--format", "xml"], "xml"),
                                    (["clear", "all"], "all")]:
            with self.subTest(arguments=arguments):
                self.assertIn(expected, self.run_cache(*arguments, code=1))


class CommandLine(Tool):
    def test_help_and_version(self):
        self.assertIn("score-mod", self.tool("bench", "--help"))
        self.assertIn("explain", self.tool("--help"))
        self.assertRegex(self.tool("--version"), r"^attnjit \d+\.\d+\.\d+\n$")

    def test_no_or_wrong_command(self):
        self.tool(code=1)
        self.assertIn("bogus", self.tool("bogus", code=1))
        self.tool("bench", code=1)

    def test_a_bad_environment_is_the_environments_fault(self):
        self.assertIn("ATTNJIT_CPU_ISA", self.tool("explain", "score", code=2, env={"ATTNJIT_CPU_ISA": "z80"}))


if __name__ == "__main__":
    unittest.main()
