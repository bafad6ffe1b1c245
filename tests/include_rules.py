"""Checks which layer includes which: dsl nothing but the standard library, kernels_templates nothing, compiler knows
dsl and LLVM, runtime knows the compiler through one header, bench and examples the public headers only."""

import pathlib
import re
import sys

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)
PROJECT = ("dsl/", "compiler/", "kernels_templates/", "runtime/", "attnjit/")
LLVM = re.compile(r"^(mlir|llvm|llvm-c|clang)/")
CUDA = re.compile(r"^(cuda|cuda_.*|nvrtc|nvJitLink|cudnn|cublas.*)\.h$|^(cuda|cute|cutlass)/")
SUFFIXES = (".h", ".hpp", ".c", ".cpp", ".cuh", ".inc")


def layer_of(header):
    return next((p[:-1] for p in PROJECT if header.startswith(p)), None)


def violation(path, header):
    """Why `path` (relative, posix) may not include `header`, or None."""
    layer = path.split("/")[0]
    to = layer_of(header)
    if CUDA.match(header) and layer != "examples":  # those that need a user's CUDA are built where it is
        return "the build needs no CUDA headers"
    if layer == "dsl":
        if path.startswith("dsl/include/"):
            return None if "/" not in header and not header.endswith(".h") else "public DSL header: standard library only"
        if to == "dsl" or header.startswith("attnjit/expr"):
            return None
        return None if "/" not in header and not header.endswith(".h") else "dsl: standard library and dsl/ only"
    if layer == "kernels_templates":
        return None if to == "kernels_templates" else "kernels_templates include nothing from outside"
    if layer == "compiler":
        return "compiler never includes runtime" if to in ("runtime",) or header.startswith("attnjit/attnjit") else None
    if layer == "runtime":
        if LLVM.match(header):
            return "runtime does not know LLVM"
        if to == "compiler" and header != "compiler/compiler.h":
            return "runtime knows the compiler through compiler/compiler.h only"
        return None
    if path.startswith("tests/numerics/") and to == "dsl":
        return None  # the oracle interprets the same tree
    if layer in ("bench", "examples") or path.startswith("tests/numerics"):
        if to in ("dsl", "compiler", "kernels_templates", "runtime") or LLVM.match(header):
            return "public headers only"
    return None


def check(root):
    found = []
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root).as_posix()
        if path.suffix not in SUFFIXES or relative.split("/")[0].startswith((".", "build")):
            continue
        for header in INCLUDE.findall(path.read_text(errors="replace")):
            why = violation(relative, header)
            if why:
                found.append(f"{relative}: includes {header}: {why}")
    return found


def self_test():
    """The rules reject what they exist to reject."""
    bad = [("dsl/parser.cpp", "llvm/ADT/StringRef.h"), ("dsl/parser.cpp", "compiler/compiler.h"),
           ("kernels_templates/cpu/tile.cpp", "cmath"), ("kernels_templates/sm80/forward.cuh", "cuda_fp16.h"),
           ("runtime/cuda_driver.cpp", "cuda.h"), ("compiler/nvrtc.cpp", "nvrtc.h"), ("compiler/passes.cpp", "runtime/forward.h"),
           ("runtime/plan.cpp", "compiler/dialect.h"), ("runtime/plan.cpp", "mlir/IR/MLIRContext.h"),
           ("bench/main.cpp", "dsl/expr.h"), ("examples/quickstart.cpp", "runtime/forward.h"),
           ("tests/numerics/execute.cpp", "compiler/compiler.h"), ("tests/numerics/execute.cpp", "runtime/forward.h")]
    return [f"self-test: {p} -> {h} was allowed" for p, h in bad if violation(p, h) is None]


if __name__ == "__main__":
    errors = self_test() + check(pathlib.Path(sys.argv[1]))
    print("\n".join(errors) or "include rules hold")
    sys.exit(bool(errors))
