// RUN: attnjit-opt -attnjit-stage-reads %s | FileCheck %s

// CHECK-LABEL: func.func @staged
func.func @staged(%s: f32) -> (f32, i64, f32) {
  %b = attnjit.index b below 2
  %q = attnjit.index q_idx below 64
  %kv = attnjit.index kv_idx below 96
  %c4 = arith.constant 4 : i64
  %from = arith.subi %kv, %b : i64
  %shifted = arith.addi %c4, %from : i64
  // A read index and a clamped one: the lane's row is anywhere, its elements still side by side.
  %row = attnjit.read 0[%q] extents [64] strides [1] in_bounds [true] : i32 -> i64
  // CHECK: attnjit.read 1{{.*}} in_bounds [true, false, true] staged 0 : bf16 -> f32
  %x = attnjit.read 1[%b, %row, %shifted] extents [2, 64, 100] strides [-1, -1, 1] in_bounds [true, false, true] : bf16 -> f32
  // The keys need not be the last dimension.
  // CHECK: attnjit.read 2{{.*}} staged 1 : ui8 -> i64
  %y = attnjit.read 2[%kv, %q] extents [96, 64] strides [1, -1] in_bounds [true, true] : ui8 -> i64
  // Enough is enough.
  // CHECK: attnjit.read 3{{.*}} in_bounds [true, true] : f32 -> f32
  %z = attnjit.read 3[%q, %kv] extents [64, 96] strides [-1, 1] in_bounds [true, true] : f32 -> f32
  return %x, %y, %z : f32, i64, f32
}

// CHECK-LABEL: func.func @left_alone
// CHECK-NOT: staged
// CHECK: return
func.func @left_alone(%s: f32) -> (f32, f32, f32, f32, f32, i64, f32, f32, f32, f32, f32, f32, f32) {
  %q = attnjit.index q_idx below 64
  %kv = attnjit.index kv_idx below 96
  %c2 = arith.constant 2 : i64
  %i = attnjit.to_int %s
  %twice = arith.muli %kv, %c2 : i64
  %sum = arith.addi %kv, %kv : i64
  %back = arith.subi %c2, %kv : i64
  %diagonal = arith.addi %q, %kv : i64
  %with_score = arith.addi %kv, %i : i64
  // The same for every lane, or every row.
  %uniform = attnjit.read 0[%c2, %kv] extents [64, 96] strides [-1, 1] in_bounds [true, true] : f32 -> f32
  %same = attnjit.read 0[%q, %c2] extents [64, 96] strides [-1, 1] in_bounds [true, true] : f32 -> f32
  %broadcast = attnjit.read 0[%q, %kv] extents [64, 96] strides [0, 1] in_bounds [true, true] : f32 -> f32
  %one = attnjit.read 0[%q, %kv] extents [1, 96] strides [-1, 1] in_bounds [true, true] : f32 -> f32
  // Not side by side along the keys, or clamped there.
  %strided = attnjit.read 0[%q, %kv] extents [64, 96] strides [-1, -1] in_bounds [true, true] : f32 -> f32
  %wide = attnjit.read 0[%q, %kv] extents [64, 96] strides [-1, 1] in_bounds [true, true] : i64 -> i64
  %every_other = attnjit.read 0[%q, %twice] extents [64, 191] strides [-1, 1] in_bounds [true, true] : f32 -> f32
  %added = attnjit.read 0[%q, %sum] extents [64, 191] strides [-1, 1] in_bounds [true, true] : f32 -> f32
  %reversed = attnjit.read 0[%q, %back] extents [64, 191] strides [-1, 1] in_bounds [true, true] : f32 -> f32
  %clamped = attnjit.read 0[%q, %kv] extents [64, 95] strides [-1, 1] in_bounds [true, false] : f32 -> f32
  // Lanes side by side, too; two indices that move; the score.
  %lanes = attnjit.read 0[%q, %diagonal] extents [64, 160] strides [-1, 1] in_bounds [true, true] : f32 -> f32
  %both = attnjit.read 0[%diagonal, %kv] extents [160, 96] strides [-1, 1] in_bounds [true, true] : f32 -> f32
  %scored = attnjit.read 0[%q, %with_score] extents [64, 96] strides [-1, 1] in_bounds [true, true] : f32 -> f32
  return %uniform, %same, %broadcast, %one, %strided, %wide, %every_other, %added, %reversed, %clamped, %lanes, %both, %scored : f32, f32, f32, f32, f32, i64, f32, f32, f32, f32, f32, f32, f32
}

// Sinks whose keys lie side by side in a packed tensor, and those that do not.
// CHECK-LABEL: func.func @sinks
func.func @sinks(%s: f32, %g: f32) -> (f32, f32, f32, f32, f32, f32, f32) {
  %q = attnjit.index q_idx below 64
  %kv = attnjit.index kv_idx below 96
  %c0 = arith.constant 0 : i64
  %i = attnjit.to_int %s
  %diagonal = arith.addi %q, %kv : i64
  // CHECK: attnjit.sink %arg1 into 0{{.*}} {attnjit.along_keys}
  %along = attnjit.sink %g into 0[%q, %kv, %c0] extents [64, 96, 1] in_bounds [true, true, true]
  // Clamped queries are no obstacle.
  // CHECK: attnjit.sink %arg1 into 1{{.*}} {attnjit.along_keys}
  %clamped_row = attnjit.sink %g into 1[%q, %kv] extents [60, 96] in_bounds [false, true]
  // CHECK-NOT: attnjit.along_keys
  %clamped = attnjit.sink %g into 2[%q, %kv] extents [64, 90] in_bounds [true, false]
  %outer = attnjit.sink %g into 3[%kv, %q] extents [96, 64] in_bounds [true, true]
  %both = attnjit.sink %g into 4[%kv, %kv] extents [96, 96] in_bounds [true, true]
  %lanes = attnjit.sink %g into 5[%q, %diagonal] extents [64, 160] in_bounds [true, true]
  %scored = attnjit.sink %g into 6[%i, %kv] extents [64, 96] in_bounds [false, true]
  return %along, %clamped_row, %clamped, %outer, %both, %lanes, %scored : f32, f32, f32, f32, f32, f32, f32
}
