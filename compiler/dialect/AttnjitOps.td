// The attnjit dialect: what upstream lacks to say a score_mod as a function of one element.
#ifndef ATTNJIT_OPS
#define ATTNJIT_OPS

include "mlir/IR/OpBase.td"
include "mlir/IR/EnumAttr.td"
include "mlir/Interfaces/SideEffectInterfaces.td"
include "mlir/Interfaces/InferIntRangeInterface.td"
include "mlir/Interfaces/InferTypeOpInterface.td"

def Attnjit_Dialect : Dialect {
  let name = "attnjit";
  let summary = "One attention score as a function of its place and of captured tensors";
  let cppNamespace = "::attnjit::compiler";
  let dependentDialects = ["::mlir::arith::ArithDialect"];
  let hasConstantMaterializer = 1;
}

class Attnjit_Op<string mnemonic, list<Trait> traits = []> : Op<Attnjit_Dialect, mnemonic, traits # [Pure]>;

def Attnjit_Role : I32EnumAttr<"Role", "which coordinate of an element", [
    I32EnumAttrCase<"B", 0, "b">, I32EnumAttrCase<"H", 1, "h">,
    I32EnumAttrCase<"Q", 2, "q_idx">, I32EnumAttrCase<"Kv", 3, "kv_idx">]> {
  let cppNamespace = "::attnjit::compiler";
}

def Attnjit_IndexOp : Attnjit_Op<"index",
    [DeclareOpInterfaceMethods<InferIntRangeInterface, ["inferResultRanges"]>]> {
  let summary = "A coordinate of the element: batch, query head, logical query or key position";
  let description = [{
    Runs over [0, extent). Without an extent nothing is known but that it is not negative.

    ```mlir
    %q = attnjit.index q_idx below 4096
    ```
  }];
  let arguments = (ins Attnjit_Role:$role, OptionalAttr<I64Attr>:$extent);
  let results = (outs I64:$result);
  let assemblyFormat = "$role (`below` $extent^)? attr-dict";
  let hasVerifier = 1;
}

def Attnjit_End : I32EnumAttr<"End", "which end of a tile", [
    I32EnumAttrCase<"First", 0, "first">, I32EnumAttrCase<"Last", 1, "last">]> {
  let cppNamespace = "::attnjit::compiler";
}

def Attnjit_TileEndOp : Attnjit_Op<"tile_end",
    [DeclareOpInterfaceMethods<InferIntRangeInterface, ["inferResultRanges"]>]> {
  let summary = "The first or the last value of a coordinate in a tile, both of which belong to it";
  let description = [{
    As the coordinate itself it lies in [0, extent). A tile is of one batch: its ends are the same.

    ```mlir
    %q = attnjit.tile_end first q_idx below 4096
    ```
  }];
  let arguments = (ins Attnjit_End:$end, Attnjit_Role:$role, I64Attr:$extent);
  let results = (outs I64:$result);
  let assemblyFormat = "$end $role `below` $extent attr-dict";
  let hasVerifier = 1;
}

def Attnjit_ReadOp : Attnjit_Op<"read",
    [DeclareOpInterfaceMethods<InferIntRangeInterface, ["inferResultRanges"]>]> {
  let summary = "An element of a captured tensor, widened to the language's type";
  let description = [{
    `capture` is its number in the captured table, `element` its type in memory (bool: i1, uint8: ui8). One index per
    dimension, clamped to [0, extent) unless `in_bounds` says that it needs no clamp; the read therefore never leaves
    the tensor and may be executed speculatively. `strides` holds, per dimension, 0 (broadcast), 1 (contiguous) or -1
    (known at run time only). `staged` numbers the reads whose elements of a whole tile are gathered beforehand
    (attnjit-stage-reads).

    ```mlir
    %bias = attnjit.read 0[%h, %d] extents [8, 1023] strides [-1, 1] : bf16 -> f32
    ```
  }];
  let arguments = (ins I32Attr:$capture, Variadic<I64>:$indices, DenseI64ArrayAttr:$extents,
                       DenseI64ArrayAttr:$strides, OptionalAttr<DenseBoolArrayAttr>:$in_bounds, OptionalAttr<I32Attr>:$staged,
                       TypeAttr:$element);
  let results = (outs AnyTypeOf<[I1, I64, F32]>:$result);
  let assemblyFormat = [{
    $capture `[` $indices `]` `extents` $extents `strides` $strides (`in_bounds` $in_bounds^)?
    (`staged` $staged^)? attr-dict `:` $element `->` type($result)
  }];
  let hasVerifier = 1;
}

def Attnjit_SinkOp : Attnjit_Op<"sink"> {
  let summary = "What an element adds to the gradient of a captured tensor, and where";
  let description = [{
    `value` is added to the element of capture number `capture`'s gradient that the indices name, clamped as a read's
    are: one index per dimension. The result is `value`; a function returns the results of its sinks behind its other
    results, in the order in which code numbers them, so that an operation without users is dead as any other.
    `row_shift`: `value` is to be computed once per row, from the gradient of the row's LSE in the place of that of the
    element's modified score.

    ```mlir
    %added = attnjit.sink %grad into 0[%h, %d] extents [8, 1023] in_bounds [true, false]
    ```
  }];
  let arguments = (ins F32:$value, I32Attr:$capture, Variadic<I64>:$indices, DenseI64ArrayAttr:$extents,
                       OptionalAttr<DenseBoolArrayAttr>:$in_bounds, UnitAttr:$row_shift);
  let results = (outs F32:$result);
  let assemblyFormat = [{
    $value `into` $capture `[` $indices `]` `extents` $extents (`in_bounds` $in_bounds^)? (`row_shift` $row_shift^)?
    attr-dict
  }];
  let hasVerifier = 1;
}

class Attnjit_DivisionOp<string mnemonic> : Attnjit_Op<mnemonic,
    [SameOperandsAndResultType, DeclareOpInterfaceMethods<InferIntRangeInterface, ["inferResultRanges"]>]> {
  let arguments = (ins AnyTypeOf<[I32, I64]>:$lhs, AnyTypeOf<[I32, I64]>:$rhs);
  let results = (outs AnyTypeOf<[I32, I64]>:$result);
  let assemblyFormat = "$lhs `,` $rhs attr-dict `:` type($result)";
  let hasFolder = 1;
}
def Attnjit_FloorDivOp : Attnjit_DivisionOp<"floordiv"> {
  let summary = "Integer division rounded down; x // 0 is 0 and the smallest integer divided by -1 wraps";
}
def Attnjit_FloorModOp : Attnjit_DivisionOp<"floormod"> {
  let summary = "What floordiv leaves, with the divisor's sign; x % 0 is 0";
}

def Attnjit_FloorLog2Op : Attnjit_Op<"floor_log2",
    [SameOperandsAndResultType, DeclareOpInterfaceMethods<InferIntRangeInterface, ["inferResultRanges"]>]> {
  let summary = "The largest n for which 2^n is not above the operand; 0 where that is below 1";
  let arguments = (ins AnyTypeOf<[I32, I64]>:$value);
  let results = (outs AnyTypeOf<[I32, I64]>:$result);
  let assemblyFormat = "$value attr-dict `:` type($result)";
}

def Attnjit_ToIntOp : Attnjit_Op<"to_int"> {
  let summary = "Float to integer: truncates, saturates, NaN gives 0";
  let arguments = (ins F32:$value);
  let results = (outs I64:$result);
  let assemblyFormat = "$value attr-dict";
  let hasFolder = 1;
}

def Attnjit_GeluOp : Attnjit_Op<"gelu"> {
  let summary = "x/2 * erfc(-x/sqrt(2)), as one function: in parts it loses its digits for negative x";
  let arguments = (ins F32:$value);
  let results = (outs F32:$result);
  let assemblyFormat = "$value attr-dict";
}

#endif
