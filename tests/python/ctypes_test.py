"""bench/attnjit_ctypes.py against attention in plain Python: ctypes_test.py MODULE_DIR LIBRARY."""
import math
import pathlib
import random
import sys
import unittest

sys.path.insert(0, sys.argv.pop(1))
LIBRARY = pathlib.Path(sys.argv.pop(1))

import attnjit_ctypes as attnjit  # noqa: E402  (its folder is an argument)


class Strided(attnjit.HostTensor):
    """(B, H, S, D) over memory in the order (B, S, H, D)."""

    def __init__(self, shape, values=None):
        b, h, s, d = shape
        super().__init__((b, s, h, d), values)
        self.shape = tuple(shape)

    def stride(self):
        _, h, s, d = self.shape
        return (s * h * d, d, h * d, 1)

    def at(self, *index):
        return self.values[sum(i * n for i, n in zip(index, self.stride()))]


def attention(q, k, v, mod, scale):
    """(b, h, i) -> (o, lse)"""
    (batch, heads, length, width), (_, heads_kv, keys, _) = q.shape, k.shape
    rows = {}
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // heads_kv)
            for i in range(length):
                scores = [mod(scale * sum(q.at(b, h, i, d) * k.at(b, g, j, d) for d in range(width)), b, h, i, j)
                          for j in range(keys)]
                largest = max(scores)
                p = [math.exp(s - largest) for s in scores]
                o = [sum(p[j] * v.at(b, g, j, d) for j in range(keys)) / sum(p) for d in range(v.shape[3])]
                rows[b, h, i] = o, largest + math.log(sum(p))
    return rows


class CtypesTest(unittest.TestCase):
    def setUp(self):
        self.context = attnjit.Context(attnjit.Library(LIBRARY), threads=1)
        random.seed(5)

        def normal(*shape):
            return Strided(shape, [random.gauss(0, 1) for _ in range(math.prod(shape))])

        self.q, self.k, self.v = normal(2, 4, 9, 8), normal(2, 2, 11, 8), normal(2, 2, 11, 5)
        self.o, self.lse = Strided((2, 4, 9, 5)), attnjit.HostTensor((2, 4, 9))
        self.slopes = attnjit.HostTensor((4,), [0.5, -0.25, 0.125, 2.0])

    def call(self, **options):
        return attnjit.Call(self.context, self.q, self.k, self.v, self.o, lse=self.lse, **options)

    def run_call(self, call):
        workspace = attnjit.HostTensor((call.workspace_size + 64,), dtype="uint8")
        call.run(-(-workspace.data_ptr() // 64) * 64)

    def expect(self, mod, scale):
        rows = attention(self.q, self.k, self.v, mod, scale)
        self.assertEqual(len(rows), 2 * 4 * 9)
        for (b, h, i), (o, lse) in rows.items():
            for d, value in enumerate(o):
                self.assertAlmostEqual(self.o.at(b, h, i, d), value, delta=1e-5)
            self.assertAlmostEqual(self.lse.values[(b * 4 + h) * 9 + i], lse, delta=1e-4)

    def test_captures_masks_and_scale(self):
        def mod(s, b, h, i, j):
            return s + self.slopes.values[h] * (j - i) if i >= j - 2 else -math.inf

        for backend in ("auto", "cpu", "math"):
            self.o.values[:] = attnjit.HostTensor(self.o.shape, [math.nan] * len(self.o.values)).values
            call = self.call(score_mod="score + slopes[h] * (kv_idx - q_idx)", mask_mod="q_idx >= kv_idx - 2",
                             captures={"slopes": self.slopes}, scale=0.3, backend=backend)
            self.run_call(call)
            self.expect(mod, 0.3)
            self.assertEqual(call.description()["backend"], "cpu" if backend == "auto" else backend)

    def test_new_values_without_a_new_plan(self):
        call = self.call(score_mod="score * slopes[h]", captures={"slopes": self.slopes})
        for factor in (1.0, -0.5):
            for i in range(4):
                self.slopes.values[i] = factor * (i + 1)
            self.run_call(call)
            self.expect(lambda s, b, h, i, j: s * self.slopes.values[h], 8 ** -0.5)

    def test_backward(self):
        """Against differences of the loss, in the oracle's double precision."""
        score_mod, mask_mod = "score * slopes[h] + tanh(score) * (kv_idx - q_idx) * 0.1", "q_idx >= kv_idx - 2"
        grad_out = Strided(self.o.shape, [random.gauss(0, 1) for _ in self.o.values])
        grad_lse = attnjit.HostTensor(self.lse.shape, [random.gauss(0, 1) for _ in self.lse.values])
        rows = [(b, h, i) for b in range(2) for h in range(4) for i in range(9)]

        def loss(call):
            o, lse = call.reference(rows)
            return sum(grad_lse.values[(b * 4 + h) * 9 + i] * lse[n] +
                       sum(grad_out.at(b, h, i, d) * o[n][d] for d in range(5)) for n, (b, h, i) in enumerate(rows))

        for backend in ("cpu", "math"):
            call = self.call(score_mod=score_mod, mask_mod=mask_mod, captures={"slopes": self.slopes}, backend=backend)
            self.run_call(call)
            dq, dk, dv = (Strided(t.shape) for t in (self.q, self.k, self.v))
            slopes = attnjit.HostTensor((4,))
            backward = attnjit.Backward(call, grad_out, grad_lse, dq, dk, dv, captures={"slopes": slopes},
                                        deterministic=True, partial_keys=backend == "math")
            self.run_call(backward)
            self.assertEqual(backward.description()["gradients"]["partial_keys"], backend == "math")
            self.assertEqual(backward.description()["gradients"]["captures"], ["slopes"])
            for tensor, gradient in ((self.q, dq), (self.k, dk), (self.v, dv), (self.slopes, slopes)):
                for at in random.sample(range(len(tensor.values)), 3):
                    value = tensor.values[at]
                    tensor.values[at] = value + 2 ** -8
                    step, above = tensor.values[at], loss(call)
                    tensor.values[at] = value - 2 ** -8
                    step, below = step - tensor.values[at], loss(call)
                    tensor.values[at] = value
                    expected = (above - below) / step
                    self.assertAlmostEqual(gradient.values[at], expected, delta=1e-3 * (1 + abs(expected)))

    def test_reference(self):
        rows = [(0, 0, 0), (1, 3, 8), (1, 0, 4)]
        o, lse = self.call(score_mod="causal").reference(rows)
        right = attention(self.q, self.k, self.v, lambda s, b, h, i, j: s if i >= j else -math.inf,
                          attnjit.ctypes.c_float(8 ** -0.5).value)
        for number, row in enumerate(rows):
            for one, other in zip(o[number], right[row][0], strict=True):
                self.assertAlmostEqual(one, other, delta=1e-12)
            self.assertAlmostEqual(lse[number], right[row][1], delta=1e-12)

    def test_registered_mods_and_explain(self):
        self.context.register_mod("tilted", ["slope"], "score + slope * kv_idx")
        explained = self.call(score_mod="tilted(0.5)", prepare=False).explain()
        self.assertIn("kv_idx", str(explained["score_mod"]))
        self.assertNotIn("mlir", explained)
        self.assertIn("func.func", self.call(score_mod="noop", prepare=False).explain(dump=True)["mlir"])
        with self.assertRaisesRegex(attnjit.AttnjitError, "options.arch is 'sm_x'"):
            self.call(prepare=False).explain(arch="sm_x")

    def test_failures_carry_status_and_message(self):
        with self.assertRaises(attnjit.AttnjitError) as raised:
            self.call(score_mod="score +")
        self.assertEqual(raised.exception.status, "invalid expression")
        self.assertIn("^", str(raised.exception))
        with self.assertRaisesRegex(TypeError, "float64"):
            tensor = attnjit.HostTensor((1,))
            tensor.dtype = "float64"
            attnjit.lend(tensor)

    @unittest.skipUnless(__import__("importlib.util").util.find_spec("torch"), "no PyTorch")
    def test_torch_tensors(self):
        import torch
        q, k, v = [torch.randn(1, 6, 2, 16).transpose(1, 2) for _ in range(3)]
        o = torch.empty_like(q)
        self.run_call(attnjit.Call(self.context, q, k, v, o, score_mod="causal"))
        right = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(o, right, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    unittest.main()
