"""attnjit's C interface (runtime/include/attnjit/attnjit.h) on PyTorch tensors through ctypes, for tests and benchmarks.

Nothing is copied: a tensor is lent by its data pointer, shape and strides. Anything with data_ptr(), shape, stride(),
dtype and device works in the place of a PyTorch tensor, such as HostTensor below; this file does not import torch.

    library = Library("lib/libattnjit.so")
    context = Context(library)
    call = Call(context, q, k, v, o, score_mod="score + slopes[h] * (kv_idx - q_idx)", captures={"slopes": slopes})
    workspace = torch.empty(call.workspace_size, dtype=torch.uint8, device="cuda")
    call.run(workspace.data_ptr(), torch.cuda.current_stream().cuda_stream)
    backward = Backward(call, grad_out, dq=dq, dk=dk, dv=dv, captures={"slopes": grad_slopes})  # call has an lse
    backward.run(...)  # as call.run
"""
import array
import ctypes
import json
import math
from types import SimpleNamespace

# attnjit_backend, by the names of attnjit_backend_name.
BACKENDS = {"auto": 0, "math": 1, "cpu": 2, "sm80": 3, "sm90": 4}

_CPU, _CUDA = 1, 2  # DLDeviceType
_INT, _UINT, _FLOAT, _BFLOAT, _BOOL = 0, 1, 2, 4, 6  # DLDataTypeCode
_DTYPES = {
    "float32": (_FLOAT, 32), "float16": (_FLOAT, 16), "bfloat16": (_BFLOAT, 16), "bool": (_BOOL, 8),
    "int8": (_INT, 8), "int16": (_INT, 16), "int32": (_INT, 32), "int64": (_INT, 64), "uint8": (_UINT, 8),
}


class _DLDevice(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", _DLDevice), ("ndim", ctypes.c_int32), ("dtype", _DLDataType),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
                ("byte_offset", ctypes.c_uint64)]


class _Capture(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("tensor", ctypes.POINTER(_DLTensor))]


class _Attention(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("score_mod", ctypes.c_char_p), ("mask_mod", ctypes.c_char_p),
                *[(name, ctypes.POINTER(_DLTensor)) for name in ("q", "k", "v", "o", "lse", "row_max")],
                ("captures", ctypes.POINTER(_Capture)), ("num_captures", ctypes.c_size_t),
                ("scale", ctypes.POINTER(ctypes.c_float)), ("backend", ctypes.c_int), ("max_autotune", ctypes.c_int)]


class _Gradients(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t),
                *[(name, ctypes.POINTER(_DLTensor)) for name in ("grad_out", "grad_lse", "dq", "dk", "dv")],
                ("captures", ctypes.POINTER(_Capture)), ("num_captures", ctypes.c_size_t),
                ("deterministic", ctypes.c_int), ("partial_keys", ctypes.c_int)]


class _ContextOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("num_threads", ctypes.c_int), ("backends", ctypes.c_uint32)]


class _ExplainOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("arch", ctypes.c_char_p), ("dump", ctypes.c_int),
                ("gradients", ctypes.c_void_p)]


class _Row(ctypes.Structure):
    _fields_ = [("b", ctypes.c_int64), ("h", ctypes.c_int64), ("q_idx", ctypes.c_int64)]


class AttnjitError(RuntimeError):
    """A status that is not OK. `status` is its name: "invalid argument", ..."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class HostTensor:
    """A row-major float32 or integer tensor in the program's memory, with the few members of a PyTorch tensor used here."""

    _CODES = {"float32": "f", "int32": "i", "int64": "q", "uint8": "B"}

    def __init__(self, shape, values=None, dtype="float32"):
        self.shape, self.dtype, self.device = tuple(shape), dtype, SimpleNamespace(type="cpu", index=0)
        values = [0] * math.prod(self.shape) if values is None else values
        self.values = array.array(self._CODES[dtype], values)
        if len(self.values) != math.prod(self.shape):
            raise ValueError(f"{len(self.values)} values for shape {self.shape}")

    def data_ptr(self):
        return self.values.buffer_info()[0]

    def stride(self):
        return tuple(math.prod(self.shape[i + 1:]) for i in range(len(self.shape)))


class MetaTensor:
    """A row-major tensor of the CUDA device without memory: enough to prepare or explain a call."""

    def __init__(self, shape, dtype, device="cuda"):
        self.shape, self.dtype, self.device = tuple(shape), dtype, SimpleNamespace(type=device, index=0)

    def data_ptr(self):
        return 0

    stride = HostTensor.stride


def lend(tensor):
    """A DLTensor of a tensor's memory, good while both exist; its extents travel along."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise TypeError(f"attnjit reads no {name}; allowed are {', '.join(_DTYPES)}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"attnjit knows no device {tensor.device.type}")
    code, bits = _DTYPES[name]
    rank = len(tensor.shape)
    extents = (ctypes.c_int64 * max(rank, 1))(*tensor.shape)
    strides = (ctypes.c_int64 * max(rank, 1))(*tensor.stride())
    device = _DLDevice(_CUDA if tensor.device.type == "cuda" else _CPU, tensor.device.index or 0)
    lent = _DLTensor(tensor.data_ptr() or None, device, rank, _DLDataType(code, bits, 1),
                     ctypes.cast(extents, ctypes.POINTER(ctypes.c_int64)),
                     ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64)), 0)
    lent.owner = (tensor, extents, strides)
    return lent


class Library:
    """The shared library, its functions typed; a status that is not OK raises AttnjitError."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        pointer, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
        attention, row = ctypes.POINTER(_Attention), ctypes.POINTER(_Row)
        gradients = ctypes.POINTER(_Gradients)
        doubles, out = ctypes.POINTER(ctypes.c_double), ctypes.POINTER(pointer)
        checked = dict(
            context_create=[ctypes.POINTER(_ContextOptions), out],
            register_mod=[pointer, text, ctypes.POINTER(text), size, text, ctypes.c_int],
            prepare=[pointer, attention, out],
            run=[pointer, attention, pointer, size, pointer],
            prepare_backward=[pointer, attention, gradients, out, out],
            run_backward=[pointer, attention, gradients, pointer, size, pointer],
            reference=[pointer, attention, row, size, doubles, doubles, doubles],
            explain=[pointer, attention, ctypes.POINTER(_ExplainOptions), out],
        )
        for name, arguments in checked.items():
            self._declare(name, arguments, ctypes.c_int).errcheck = self._check
        for name, arguments, result in (
            ("context_destroy", [pointer], None), ("plan_destroy", [pointer], None), ("free", [pointer], None),
            ("plan_workspace_size", [pointer], size), ("plan_description", [pointer], text),
            ("last_error", [], text), ("status_name", [ctypes.c_int], text), ("version", [], text),
        ):
            self._declare(name, arguments, result)

    def _declare(self, name, arguments, result):
        function = getattr(self._library, f"attnjit_{name}")
        function.argtypes, function.restype = arguments, result
        setattr(self, name, function)
        return function

    def _check(self, status, function, arguments):
        if status != 0:
            raise AttnjitError(self.status_name(status).decode(), self.last_error().decode(errors="replace"))
        return status


class Context:
    def __init__(self, library, threads=0):
        self.library, self.handle = library, ctypes.c_void_p()
        options = _ContextOptions(ctypes.sizeof(_ContextOptions), threads, 0)
        library.context_create(ctypes.byref(options), ctypes.byref(self.handle))

    def register_mod(self, name, parameters, body, is_mask=False):
        names = (ctypes.c_char_p * max(len(parameters), 1))(*[p.encode() for p in parameters])
        self.library.register_mod(self.handle, name.encode(), names, len(parameters), body.encode(), int(is_mask))

    def __del__(self):
        if getattr(self, "handle", None):
            self.library.context_destroy(self.handle)


def _text(value):
    return None if value is None else value.encode()


def _captures(tensors):
    """The lent tensors of a dict by name, and the records that point to them."""
    lent = {name: lend(tensor) for name, tensor in (tensors or {}).items()}
    records = (_Capture * max(len(lent), 1))(
        *[_Capture(name.encode(), ctypes.pointer(tensor)) for name, tensor in lent.items()])
    return lent, records


class Call:
    """One attention call with its plan; tensors as attnjit.h says: q, k, v, o (B, H, S, D), lse and row_max (B, H, S)."""

    def __init__(self, context, q, k, v, o, lse=None, row_max=None, score_mod=None, mask_mod=None, captures=None,
                 scale=None, backend="auto", max_autotune=False, prepare=True):
        self.context, self.library, self.plan = context, context.library, None
        lent = {name: lend(tensor) for name, tensor in dict(q=q, k=k, v=v, o=o, lse=lse, row_max=row_max).items()
                if tensor is not None}
        captured, records = _captures(captures)
        call = _Attention(struct_size=ctypes.sizeof(_Attention), score_mod=_text(score_mod), mask_mod=_text(mask_mod),
                          captures=records, num_captures=len(captured), backend=BACKENDS[backend],
                          max_autotune=int(max_autotune))
        for name, tensor in lent.items():
            setattr(call, name, ctypes.pointer(tensor))
        if scale is not None:
            call.scale = ctypes.pointer(ctypes.c_float(scale))
        self._lent, self._call = (lent, captured, records), call
        if prepare:
            self.plan = ctypes.c_void_p()
            self.library.prepare(context.handle, ctypes.byref(call), ctypes.byref(self.plan))
            self.workspace_size = self.library.plan_workspace_size(self.plan)

    def description(self):
        return json.loads(self.library.plan_description(self.plan))

    def run(self, workspace=None, stream=None):
        """`workspace`: the address of workspace_size bytes where the tensors are; `stream`: a CUstream as an integer."""
        self.library.run(self.plan, ctypes.byref(self._call), workspace, self.workspace_size, stream)

    def reference(self, rows):
        """The double-precision oracle at rows of (b, h, q_idx): lists of o (one list a row) and lse. Host tensors only."""
        records = (_Row * len(rows))(*[_Row(*row) for row in rows])
        width = self._lent[0]["v"].shape[3]
        o, lse = (ctypes.c_double * (len(rows) * width))(), (ctypes.c_double * len(rows))()
        self.library.reference(self.context.handle, ctypes.byref(self._call), records, len(rows), o, lse, None)
        return [o[i * width:(i + 1) * width] for i in range(len(rows))], list(lse)

    def explain(self, dump=False, arch=None):
        """What the compiler makes of the call; with `arch`, "sm_80" and the like, of its CUDA kernels."""
        text = ctypes.c_void_p()
        options = _ExplainOptions(ctypes.sizeof(_ExplainOptions), arch.encode() if arch else None, int(dump), None)
        self.library.explain(self.context.handle, ctypes.byref(self._call), ctypes.byref(options), ctypes.byref(text))
        try:
            return json.loads(ctypes.string_at(text.value))
        finally:
            self.library.free(text)

    def __del__(self):
        if getattr(self, "plan", None):
            self.library.plan_destroy(self.plan)


class Backward:
    """The gradients of a Call that has an lse, with a plan of its own. Outputs are those that are given: dq, dk and dv as
    q, k and v, and `captures` as the captured tensors of those names; grad_lse (B, H, S) is optional. partial_keys: k and v
    are a part of the keys that the call's o and lse are of."""

    def __init__(self, call, grad_out, grad_lse=None, dq=None, dk=None, dv=None, captures=None, deterministic=False,
                 partial_keys=False):
        self.call, self.library, self.plan = call, call.library, None
        lent = {name: lend(tensor)
                for name, tensor in dict(grad_out=grad_out, grad_lse=grad_lse, dq=dq, dk=dk, dv=dv).items()
                if tensor is not None}
        captured, records = _captures(captures)
        gradients = _Gradients(struct_size=ctypes.sizeof(_Gradients), captures=records, num_captures=len(captured),
                               deterministic=int(deterministic), partial_keys=int(partial_keys))
        for name, tensor in lent.items():
            setattr(gradients, name, ctypes.pointer(tensor))
        self._lent, self._gradients = (lent, captured, records), gradients
        self.plan = ctypes.c_void_p()
        self.library.prepare_backward(call.context.handle, ctypes.byref(call._call), ctypes.byref(gradients), None,
                                      ctypes.byref(self.plan))
        self.workspace_size = self.library.plan_workspace_size(self.plan)

    def run(self, workspace=None, stream=None):
        """As Call.run; the call's o and lse are read."""
        self.library.run_backward(self.plan, ctypes.byref(self.call._call), ctypes.byref(self._gradients), workspace,
                                  self.workspace_size, stream)

    description, __del__ = Call.description, Call.__del__
