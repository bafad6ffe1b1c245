"""Evaluates random expressions with Python's own parser and compares with the interpreter's values.

Python parses the text: precedence, chaining, choices and literals are its own. A small value class supplies what
differs from Python's numbers: 64-bit ints, total division, PyTorch's edges, dropped elements; and it carries the
derivatives by the score and by captured floats along, forward where the library goes in reverse."""

import argparse
import ast
import json
import math
import operator
import re
import struct
import subprocess
import sys

INT_MIN, INT_MAX = -(2**63), 2**63 - 1


def wrap(i):
    return (i + 2**63) % 2**64 - 2**63


class V:
    """A value with its type. `keep` is the rule of dropped elements, `literal` marks a number in the text, `slopes` are
    the derivatives by each input and the sums of their terms' magnitudes."""

    def __init__(self, kind, value, keep=True, literal=False, slopes=()):
        self.kind, self.value, self.keep, self.literal, self.slopes = kind, value, keep, literal, dict(slopes)

    def __bool__(self):
        assert self.kind == "bool", "a condition must be a bool"
        return self.value

    def __pos__(self):
        return self

    def __neg__(self):
        if self.kind == "float":
            keep = not (self.literal and self.value == math.inf)
            return V("float", -self.value, keep, slopes=chain((self, -1.0)))
        return V("int", wrap(-int(self.value)))

    def __invert__(self):
        return V("bool", not self.value) if self.kind == "bool" else V("int", ~self.value)

    def __add__(self, other):
        return number(self, other, operator.add, lambda x, y: (1.0, 1.0), self.keep and other.keep)

    def __sub__(self, other):
        return number(self, other, operator.sub, lambda x, y: (1.0, -1.0), self.keep)

    def __mul__(self, other):
        keep = True
        if self.is_positive_literal():
            keep = other.keep
        elif other.is_positive_literal():
            keep = self.keep
        return number(self, other, operator.mul, lambda x, y: (y, x), keep)

    def __truediv__(self, other):
        slopes = lambda x, y: (divide(1.0, y), -divide(divide(x, y), y))
        return number(to_float(self), to_float(other), divide, slopes)

    def __floordiv__(self, other):
        return number(self, other, floor_divide, lambda x, y: (None, None))

    def __mod__(self, other):
        return number(self, other, modulus, lambda x, y: (1.0, -floor_divide(x, y)))

    def __pow__(self, other):
        if self.kind != "float" and other.kind == "int" and other.literal:
            return V("int", wrap(int(self.value) ** other.value))
        return number(to_float(self), to_float(other), power, power_slopes)

    def __and__(self, other):
        assert self.kind == other.kind != "float"
        return V(self.kind, self.value & other.value)

    def __or__(self, other):
        assert self.kind == other.kind != "float"
        return V(self.kind, self.value | other.value)

    def __lt__(self, other):
        return compare(self, other, operator.lt)

    def __le__(self, other):
        return compare(self, other, operator.le)

    def __gt__(self, other):
        return compare(self, other, operator.gt)

    def __ge__(self, other):
        return compare(self, other, operator.ge)

    def __eq__(self, other):
        return compare(self, other, operator.eq)

    def __ne__(self, other):
        return compare(self, other, operator.ne)

    def is_positive_literal(self):
        return self.literal and self.kind != "bool" and self.value > 0


def chain(*parts):
    """The slopes of what has these derivatives by these values. What is not chosen has None."""
    slopes = {}
    for x, derivative in parts:
        for key, (slope, size) in x.slopes.items() if derivative is not None else ():
            old_slope, old_size = slopes.get(key, (0.0, 0.0))
            slopes[key] = (old_slope + derivative * slope, old_size + abs(derivative) * size)
    return slopes


def literal(value):
    return V(type(value).__name__, value, literal=True)


def to_float(x):
    return x if x.kind == "float" else V("float", float(x.value))


def common(*values):
    """The values as the number type in which they meet, and that type."""
    if any(v.kind == "float" for v in values):
        return "float", [to_float(v) for v in values]
    return "int", [V("int", int(v.value)) for v in values]


def number(x, y, op, derivatives, keep=True):
    kind, (x, y) = common(x, y)
    result = op(x.value, y.value)
    if kind == "int":
        return V("int", wrap(result), keep)
    return V("float", result, keep, slopes=chain(*zip((x, y), derivatives(x.value, y.value))))


def compare(x, y, op):
    _, (x, y) = common(x, y)
    return V("bool", op(x.value, y.value))


def divide(x, y):
    if y != 0:
        return x / y
    return math.nan if x == 0 or math.isnan(x) else math.copysign(math.inf, x) * math.copysign(1, y)


def floor_divide(x, y):
    if isinstance(x, int):
        return 0 if y == 0 else x // y
    return rounded(math.floor, divide(x, y))


def modulus(x, y):
    if isinstance(x, int):
        return 0 if y == 0 else x % y
    if y == 0 or math.isinf(x):
        return math.nan
    # Python gives a zero the sign of y, C and PyTorch that of x; 1 / (x % y) would show it.
    return x % y or math.copysign(0.0, x)


def power(x, y):
    try:
        return math.pow(x, y)
    except OverflowError:
        return -math.inf if x < 0 and y % 2 == 1 else math.inf
    except ValueError:
        if x != 0:
            return math.nan
        return math.copysign(math.inf, x) if y % 2 == 1 else math.inf


def log(x):
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def power_slopes(x, y):
    by_x = None if y == 0 else y * power(x, y - 1)
    return by_x, None if x == 0 and y >= 0 else power(x, y) * log(x)


def rounded(how, x):
    # Python's integer result has lost the sign of a zero.
    if not math.isfinite(x):
        return x
    return float(how(x)) or math.copysign(0.0, x)


def numeric(of_float, of_int, derivatives):
    def call(*args):
        kind, args = common(*args)
        values = [a.value for a in args]
        if kind == "int":
            return V("int", wrap(of_int(*values)))
        return V("float", of_float(*values), slopes=chain(*zip(args, derivatives(*values))))

    return call


def nan_first(how):
    return lambda *values: math.nan if any(map(math.isnan, values)) else how(*values)


def chosen(condition):
    return 1.0 if condition else None


def smaller_slopes(x, y):
    if x == y:
        return 0.5, 0.5
    return chosen(not y < x), chosen(not x < y)


def larger_slopes(x, y):
    return smaller_slopes(-x, -y)


def clamp_slopes(x, lo, hi):
    inside = lo <= x <= hi
    return chosen(inside), chosen(not inside and x < lo < hi), chosen(not inside and (x > hi or hi < lo))


def sign(x):
    return x if math.isnan(x) else float((x > 0) - (x < 0))


def minimum(*args):
    result = args[0]
    for arg in args[1:]:
        keep = result.keep and arg.keep
        result = numeric(nan_first(min), min, smaller_slopes)(result, arg)
        result.keep = keep
    return result


def maximum(*args):
    result = args[0]
    for arg in args[1:]:
        result = numeric(nan_first(max), max, larger_slopes)(result, arg)
    return result


def where(condition, x, y):
    if x.kind == y.kind == "bool":
        return x if condition else y
    kept = (x if condition else y).keep
    _, (x, y) = common(x, y)
    taken = x if condition else y
    return V(taken.kind, taken.value, kept, slopes=taken.slopes)


def total(function, derivative, domain_error=math.nan, pole=None):
    """A function of math on floats, with IEEE results where Python raises."""

    def value(x):
        if pole is not None and x == pole[0]:
            return pole[1]
        try:
            return function(x)
        except OverflowError:
            return math.inf
        except ValueError:
            return domain_error

    def slope(x):
        try:
            return derivative(x)
        except (ArithmeticError, ValueError):
            return math.nan

    def call(x):
        x = to_float(x)
        return V("float", value(x.value), slopes=chain((x, slope(x.value))))

    return call


def exp(x):
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def sigmoid(x):
    return 1 / (1 + exp(-x))


def normal(x):
    return 0.5 * math.erfc(-x * math.sqrt(0.5))


def rounding(how):
    return lambda x: V("int", int(x.value)) if x.kind != "float" else V("float", rounded(how, x.value))


def to_int(x):
    if x.kind != "float":
        return V("int", int(x.value))
    if math.isnan(x.value):
        return V("int", 0)
    if math.isinf(x.value):
        return V("int", INT_MAX if x.value > 0 else INT_MIN)
    return V("int", max(INT_MIN, min(INT_MAX, math.trunc(x.value))))


FUNCTIONS = {
    "where": where,
    "min": minimum,
    "max": maximum,
    "clamp": numeric(nan_first(lambda x, lo, hi: min(max(x, lo), hi)), lambda x, lo, hi: min(max(x, lo), hi), clamp_slopes),
    "abs": numeric(abs, abs, lambda x: (sign(x),)),
    "exp": total(math.exp, math.exp),
    "exp2": total(lambda x: 2.0**x, lambda x: 2.0**x * math.log(2)),
    "log": total(math.log, lambda x: 1 / x, pole=(0, -math.inf)),
    "log2": total(math.log2, lambda x: 1 / (x * math.log(2)), pole=(0, -math.inf)),
    "log1p": total(math.log1p, lambda x: 1 / (1 + x), pole=(-1, -math.inf)),
    "sqrt": total(math.sqrt, lambda x: 0.5 / math.sqrt(x)),
    "rsqrt": total(lambda x: divide(1.0, math.sqrt(x)), lambda x: -0.5 / (x * math.sqrt(x))),
    "tanh": total(math.tanh, lambda x: 4 * sigmoid(2 * x) * sigmoid(-2 * x)),
    "sigmoid": total(sigmoid, lambda x: sigmoid(x) * sigmoid(-x)),
    "silu": total(lambda x: x / (1 + exp(-x)), lambda x: sigmoid(x) + x * sigmoid(x) * sigmoid(-x)),
    "gelu": total(lambda x: x * normal(x), lambda x: normal(x) + x * math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)),
    "relu": numeric(nan_first(lambda x: max(x, 0.0)), lambda x: max(x, 0), lambda x: (chosen(x > 0),)),
    "erf": total(math.erf, lambda x: 2 / math.sqrt(math.pi) * math.exp(-x * x)),
    "sin": total(math.sin, math.cos),
    "cos": total(math.cos, lambda x: -math.sin(x)),
    "floor": rounding(math.floor),
    "ceil": rounding(math.ceil),
    "round": rounding(round),
    "sign": numeric(sign, lambda x: (x > 0) - (x < 0), lambda x: (None,)),
    "float": to_float,
    "int": to_int,
    "bool": lambda x: V("bool", x.value != 0),
    "isinf": lambda x: V("bool", math.isinf(to_float(x).value)),
    "isnan": lambda x: V("bool", math.isnan(to_float(x).value)),
}
FORMATS = {"bool": "?", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "uint8": "B", "float16": "e", "float32": "f"}


class Tensor:
    """A captured tensor whose indices are clamped to its extents."""

    def __init__(self, name, dtype, shape, data):
        self.name, self.shape = name, shape
        self.kind = "bool" if dtype == "bool" else "float" if "float" in dtype else "int"
        if dtype == "bfloat16":
            halves = [data[i : i + 2] for i in range(0, len(data), 2)]
            self.values = [struct.unpack("<f", b"\0\0" + half)[0] for half in halves]
        elif dtype == "bool":
            self.values = [byte != 0 for byte in data]
        else:
            self.values = [v[0] for v in struct.iter_unpack("<" + FORMATS[dtype], data)]

    def __getitem__(self, indices):
        offset = 0
        for index, extent in zip(indices if isinstance(indices, tuple) else (indices,), self.shape, strict=True):
            assert index.kind != "float"
            offset = offset * extent + min(max(int(index.value), 0), extent - 1)
        return self.element(offset)

    def scalar(self):
        return self.element(0)

    def element(self, offset):
        slopes = {f"{self.name}[{offset}]": (1.0, 1.0)} if self.kind == "float" else {}
        return V(self.kind, self.values[offset], slopes=slopes)


class Values(ast.NodeTransformer):
    """Makes every literal a V, and a choice and `not` calls: Python would make a plain bool, or skip a branch's type."""

    def visit_Constant(self, node):
        return ast.Call(ast.Name("_literal", ast.Load()), [node], [])

    def visit_UnaryOp(self, node):
        self.generic_visit(node)
        return ast.Call(ast.Name("_not", ast.Load()), [node.operand], []) if isinstance(node.op, ast.Not) else node

    def visit_IfExp(self, node):
        self.generic_visit(node)
        return ast.Call(ast.Name("where", ast.Load()), [node.test, node.body, node.orelse], [])


def compiled(text):
    tree = ast.fix_missing_locations(Values().visit(ast.parse(text.strip(), mode="eval")))
    return compile(tree, text, "eval")


class Expression:
    def __init__(self, text, is_mask):
        order = ["b", "h", "q_idx", "kv_idx"] if is_mask else ["score", "b", "h", "q_idx", "kv_idx"]
        self.names = {name: name for name in order} | {"m": "q_idx", "n": "kv_idx"}
        header = re.match(r"mod\(([^()]*)\) = ", text)
        if header:
            self.names = dict(zip(header[1].split(", "), order, strict=True))
            text = text[header.end() :]
        *lets, root = text.split(";")
        self.lets = []
        for statement in lets:
            name, value = re.fullmatch(r"\s*let (\w+) = (.*)", statement, re.S).groups()
            self.lets.append((name, compiled(value)))
        self.root = compiled(root)

    def evaluate(self, tensors, element):
        scope = dict(FUNCTIONS)
        scope |= {"_literal": literal, "_not": lambda x: V("bool", not x), "inf": literal(math.inf), "nan": literal(math.nan)}
        scope |= {"true": V("bool", True), "false": V("bool", False)}
        scope |= {name: t if t.shape else t.scalar() for name, t in tensors.items()}
        scope |= {name: element[what] for name, what in self.names.items()}
        for name, value in self.lets:
            scope[name] = eval(value, scope)
        return eval(self.root, scope)


def agrees(found, expected):
    if math.isnan(expected) or math.isinf(expected):
        return found == expected or (math.isnan(found) and math.isnan(expected))
    return math.isclose(found, expected, rel_tol=1e-12, abs_tol=1e-300)


def difference(found, sample, is_mask):
    """How Python's value and the interpreter's differ, or None."""
    if is_mask:
        return None if found.kind == "bool" and found.value == sample["value"] else f"{found.value}, not {sample['value']}"
    if found.keep != sample["keep"]:
        return f"keep is {found.keep}, not {sample['keep']}"
    value = to_float(found).value if found.keep else -math.inf
    expected = float.fromhex(sample["value"])
    if not agrees(value, expected):
        return f"{value!r}, not {expected!r}"
    return gradient_difference(found, sample["gradients"])


def finite_slopes(found):
    """Those that the order in which they are multiplied does not make infinite or NaN."""
    slopes = found.slopes if found.kind == "float" and found.keep else {}
    return {key: slope for key, slope in slopes.items() if all(map(math.isfinite, slope))}


def gradient_difference(found, gradients):
    slopes = finite_slopes(found)
    unknown = found.slopes.keys() - slopes.keys() if found.keep else set()
    for key in (gradients.keys() | slopes.keys()) - unknown:
        value, size = slopes.get(key, (0.0, 0.0))
        expected = float.fromhex(gradients.get(key, "0x0p0"))
        if not abs(value - expected) <= 1e-9 * size + 1e-300:
            return f"the derivative by {key} is {value!r}, not {expected!r}"
    return None


SCORE = {"score": (1.0, 1.0)}


def self_test():
    """The comparison rejects what it exists to reject, and the evaluation is Python's."""
    one = {"score": V("float", 1.0, slopes=SCORE), "b": V("int", 0), "h": V("int", 3), "q_idx": V("int", 5), "kv_idx": V("int", 7)}
    for text, value, keep in [("-2 ** 2", -4, True), ("0 < h < 2", False, True), ("2 * (1 if h > 3 else -inf)", -math.inf, False),
                              ("(1 + 1) * (score + -inf)", -math.inf, True), ("let x = h // -2; x * x", 4, True)]:
        found = Expression(text, False).evaluate({}, one)
        assert found.value == value and found.keep == keep, text
    for text, slope in [("score ** 2 * 3 - score", 5), ("where(h == 3, score, score * inf)", 1), ("max(score, 1)", 0.5),
                        ("-score ** 2", -2), ("2 * score if h < score < 4 else 4 * score", 4)]:
        assert Expression(text, False).evaluate({}, one).slopes["score"][0] == slope, text
    sample = {"value": (1.5).hex(), "keep": True, "gradients": {}}
    assert difference(V("float", 1.5), sample, False) is None
    assert difference(V("float", 1.5 + 1e-9), sample, False)
    assert difference(V("float", 1.5, keep=False), sample, False)
    assert difference(V("float", math.nan), sample, False)
    assert difference(V("bool", True), {"value": False}, True)
    for expected in ["0x0p0", (2.0).hex(), math.inf.hex(), math.nan.hex()]:
        assert difference(V("float", 1.5, slopes=SCORE), sample | {"gradients": {"score": expected}}, False)
    assert difference(V("float", 1.5), sample | {"gradients": {"score": (1.0).hex()}}, False)
    assert difference(V("float", 1.5, slopes=SCORE), sample | {"gradients": {"score": (1.0).hex()}}, False) is None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("samples", help="the program that prints expressions")
    parser.add_argument("--count", default="1000")
    parser.add_argument("--seed", default="1")
    options = parser.parse_args()
    self_test()
    lines = subprocess.run([options.samples, options.count, options.seed], check=True, stdout=subprocess.PIPE, text=True).stdout
    failures = points = kept = finite = slopes = 0
    for line in map(json.loads, lines.splitlines()):
        expression = Expression(line["text"], line["is_mask"])
        tensors = {n: Tensor(n, c["dtype"], c["shape"], bytes.fromhex(c["bytes"])) for n, c in line["captures"].items()}
        for sample in line["points"]:
            names = ["b", "h", "q_idx", "kv_idx"]
            element = {name: V("int", i) for name, i in zip(names, sample["indices"], strict=True)}
            element["score"] = V("float", float.fromhex(sample["score"]), slopes=SCORE)
            found = expression.evaluate(tensors, element)
            points += 1
            kept += found.keep
            finite += found.kind != "float" or math.isfinite(found.value)
            slopes += sum(slope != 0 for slope, _ in finite_slopes(found).values())
            wrong = difference(found, sample, line["is_mask"])
            if wrong and (failures := failures + 1) <= 5:
                print(f"{line['text']}\n  at {sample}\n  Python: {wrong}")
    print(f"{points} points, {points - kept} dropped, {finite} finite, {slopes} derivatives, {failures} differ")
    return 1 if failures or finite < points / 2 or slopes < points / 4 or kept == points or points == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
