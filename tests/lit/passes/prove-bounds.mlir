// RUN: attnjit-opt -attnjit-prove-bounds %s | FileCheck %s

// CHECK-LABEL: func.func @reads
func.func @reads(%any: i64) -> (f32, f32, f32, f32) {
  %h = attnjit.index h below 8
  %q = attnjit.index q_idx below 128
  %kv = attnjit.index kv_idx below 96
  %c95 = arith.constant 95 : i64
  %difference = arith.subi %q, %kv : i64
  %shifted = arith.addi %difference, %c95 : i64
  // -95 + 95 to 127 + 95 = 222: 223 elements are enough, 222 are not.
  // CHECK: attnjit.read 0{{.*}} in_bounds [true, true]
  %a = attnjit.read 0[%h, %shifted] extents [8, 223] strides [-1, 1] : f32 -> f32
  // CHECK: attnjit.read 0{{.*}} in_bounds [true, false]
  %b = attnjit.read 0[%h, %shifted] extents [8, 222] strides [-1, 1] : f32 -> f32
  // CHECK: attnjit.read 0{{.*}} in_bounds [false, true]
  %c = attnjit.read 0[%h, %q] extents [7, 128] strides [-1, 1] : f32 -> f32
  // CHECK: attnjit.read 1{{.*}} in_bounds [false]
  %d = attnjit.read 1[%any] extents [9223372036854775807] strides [1] : f32 -> f32
  return %a, %b, %c, %d : f32, f32, f32, f32
}

// A product that may wrap proves nothing.
// CHECK-LABEL: func.func @wraps
// CHECK: in_bounds [false]
func.func @wraps() -> f32 {
  %q = attnjit.index q_idx below 4294967296
  %p = arith.muli %q, %q : i64
  %p2 = arith.muli %p, %q : i64
  %a = attnjit.read 0[%p2] extents [9223372036854775807] strides [1] : f32 -> f32
  return %a : f32
}
