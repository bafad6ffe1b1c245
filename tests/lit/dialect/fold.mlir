// RUN: attnjit-opt -canonicalize %s | FileCheck %s
// Division is total and floors; conversion to an integer saturates.

// CHECK-LABEL: func.func @division
// CHECK-DAG: %[[MIN:.*]] = arith.constant -9223372036854775808 : i64
// CHECK-DAG: %[[ZERO:.*]] = arith.constant 0 : i64
// CHECK-DAG: %[[M4:.*]] = arith.constant -4 : i64
// CHECK-DAG: %[[TWO:.*]] = arith.constant 2 : i64
// CHECK-DAG: %[[M1:.*]] = arith.constant -1 : i64
// CHECK: return %[[ZERO]], %[[ZERO]], %[[MIN]], %[[ZERO]], %[[M4]], %[[TWO]], %[[M1]], %arg0
func.func @division(%x: i64) -> (i64, i64, i64, i64, i64, i64, i64, i64) {
  %zero = arith.constant 0 : i64
  %one = arith.constant 1 : i64
  %m1 = arith.constant -1 : i64
  %3 = arith.constant 3 : i64
  %m3 = arith.constant -3 : i64
  %10 = arith.constant 10 : i64
  %m10 = arith.constant -10 : i64
  %min = arith.constant -9223372036854775808 : i64
  %a = attnjit.floordiv %10, %zero : i64
  %b = attnjit.floormod %10, %zero : i64
  %c = attnjit.floordiv %min, %m1 : i64
  %d = attnjit.floormod %min, %m1 : i64
  %e = attnjit.floordiv %m10, %3 : i64
  %f = attnjit.floormod %m10, %3 : i64
  %m7 = arith.constant 8 : i64
  %g = attnjit.floormod %m7, %m3 : i64
  %h = attnjit.floordiv %x, %one : i64
  return %a, %b, %c, %d, %e, %f, %g, %h : i64, i64, i64, i64, i64, i64, i64, i64
}

// CHECK-LABEL: func.func @to_int
// CHECK-DAG: %[[ZERO:.*]] = arith.constant 0 : i64
// CHECK-DAG: %[[MAX:.*]] = arith.constant 9223372036854775807 : i64
// CHECK-DAG: %[[MIN:.*]] = arith.constant -9223372036854775808 : i64
// CHECK-DAG: %[[M2:.*]] = arith.constant -2 : i64
// CHECK: return %[[ZERO]], %[[MAX]], %[[MIN]], %[[M2]]
func.func @to_int() -> (i64, i64, i64, i64) {
  %nan = arith.constant 0x7FC00000 : f32
  %large = arith.constant 1.0e+30 : f32
  %minf = arith.constant 0xFF800000 : f32
  %m2 = arith.constant -2.75 : f32
  %a = attnjit.to_int %nan
  %b = attnjit.to_int %large
  %c = attnjit.to_int %minf
  %d = attnjit.to_int %m2
  return %a, %b, %c, %d : i64, i64, i64, i64
}
