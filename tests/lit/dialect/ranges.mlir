// RUN: attnjit-opt -int-range-optimizations %s | FileCheck %s
// The ranges that our operations report: a comparison that they decide becomes a constant.

// CHECK-LABEL: func.func @index
// CHECK: %[[TRUE:.*]] = arith.constant true
// CHECK: return %[[TRUE]], %[[TRUE]]
func.func @index() -> (i1, i1) {
  %q = attnjit.index q_idx below 100
  %c99 = arith.constant 99 : i64
  %0 = arith.cmpi sle, %q, %c99 : i64
  %h = attnjit.index h
  %zero = arith.constant 0 : i64
  %1 = arith.cmpi sge, %h, %zero : i64
  return %0, %1 : i1, i1
}

// CHECK-LABEL: func.func @tile_end
// CHECK: %[[TRUE:.*]] = arith.constant true
// CHECK: return %[[TRUE]], %[[TRUE]]
func.func @tile_end() -> (i1, i1) {
  %q = attnjit.tile_end last q_idx below 100
  %c99 = arith.constant 99 : i64
  %0 = arith.cmpi sle, %q, %c99 : i64
  %zero = arith.constant 0 : i64
  %1 = arith.cmpi sge, %q, %zero : i64
  return %0, %1 : i1, i1
}

// CHECK-LABEL: func.func @floor_log2
// CHECK-DAG: %[[TRUE:.*]] = arith.constant true
// CHECK-DAG: %[[CMP:.*]] = arith.cmpi sge
// CHECK: return %[[TRUE]], %[[TRUE]], %[[CMP]]
func.func @floor_log2() -> (i1, i1, i1) {
  %q = attnjit.tile_end last q_idx below 100
  %n = attnjit.floor_log2 %q : i64
  %c6 = arith.constant 6 : i64
  %0 = arith.cmpi sle, %n, %c6 : i64
  %zero = arith.constant 0 : i64
  %1 = arith.cmpi sge, %n, %zero : i64
  %2 = arith.cmpi sge, %n, %c6 : i64
  return %0, %1, %2 : i1, i1, i1
}

// CHECK-LABEL: func.func @read
// CHECK-DAG: %[[TRUE:.*]] = arith.constant true
// CHECK-DAG: %[[CMP:.*]] = arith.cmpi sge
// CHECK: return %[[TRUE]], %[[CMP]]
func.func @read(%i: i64) -> (i1, i1) {
  %c255 = arith.constant 255 : i64
  %zero = arith.constant 0 : i64
  %u = attnjit.read 0[%i] extents [4] strides [1] : ui8 -> i64
  %0 = arith.cmpi sle, %u, %c255 : i64
  %s = attnjit.read 0[%i] extents [4] strides [1] : i8 -> i64
  %1 = arith.cmpi sge, %s, %zero : i64
  return %0, %1 : i1, i1
}

// q in [0, 99]: q // -8 in [-13, 0], q % 8 in [0, 7], q % -8 in [-7, 0], q % 1000 = q, q // (h - 2) over all signs.
// CHECK-LABEL: func.func @division
// CHECK-DAG: %[[TRUE:.*]] = arith.constant true
// CHECK-DAG: %[[LOOSE:.*]] = arith.cmpi sge, %{{.*}}, %{{.*}} : i64
// CHECK: return %[[TRUE]], %[[LOOSE]], %[[TRUE]], %[[TRUE]], %[[TRUE]], %[[TRUE]]
func.func @division() -> (i1, i1, i1, i1, i1, i1) {
  %q = attnjit.index q_idx below 100
  %h = attnjit.index h below 4
  %m8 = arith.constant -8 : i64
  %m12 = arith.constant -12 : i64
  %m13 = arith.constant -13 : i64
  %7 = arith.constant 7 : i64
  %8 = arith.constant 8 : i64
  %m7 = arith.constant -7 : i64
  %99 = arith.constant 99 : i64
  %1000 = arith.constant 1000 : i64
  %two = arith.constant 2 : i64
  %m99 = arith.constant -99 : i64
  %d = attnjit.floordiv %q, %m8 : i64
  %0 = arith.cmpi sge, %d, %m13 : i64
  %1 = arith.cmpi sge, %d, %m12 : i64
  %m = attnjit.floormod %q, %8 : i64
  %2 = arith.cmpi sle, %m, %7 : i64
  %n = attnjit.floormod %q, %m8 : i64
  %3 = arith.cmpi sge, %n, %m7 : i64
  %w = attnjit.floormod %q, %1000 : i64
  %4 = arith.cmpi sle, %w, %99 : i64
  %divisor = arith.subi %h, %two : i64
  %any = attnjit.floordiv %q, %divisor : i64
  %5 = arith.cmpi sge, %any, %m99 : i64
  return %0, %1, %2, %3, %4, %5 : i1, i1, i1, i1, i1, i1
}
