// RUN: attnjit-opt -pass-pipeline='builtin.module(func.func(attnjit-differentiate{gradients=3 partial-keys},canonicalize,cse))' %s | FileCheck %s
// The LSE is of more keys than these: what is the same along the row is summed over the keys, as anything else is.

// CHECK-LABEL: func.func @additive(%arg0: f32, %arg1: f32) -> (f32, i1, f32, f32, f32)
// CHECK: %[[ROW:.*]] = attnjit.sink %arg1 into 0[%{{.*}}] extents [16]{{$}}
// CHECK: %[[COLUMN:.*]] = attnjit.sink %arg1 into 1[%{{.*}}] extents [16]{{$}}
// CHECK: return %{{.*}}, %true, %arg1, %[[ROW]], %[[COLUMN]]
func.func @additive(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %q = attnjit.index q_idx
  %k = attnjit.index kv_idx
  %row = attnjit.read 0[%q] extents [16] strides [1] : f32 -> f32
  %column = attnjit.read 1[%k] extents [16] strides [1] : f32 -> f32
  %x = arith.addf %s, %row : f32
  %r = arith.addf %x, %column : f32
  return %r, %true : f32, i1
}

// A read that is a factor and a shift has one sink.
// CHECK-LABEL: func.func @both(%arg0: f32, %arg1: f32) -> (f32, i1, f32, f32)
// CHECK: %[[PRODUCT:.*]] = arith.mulf %arg1, %arg0
// CHECK: %[[BY_SCORE:.*]] = arith.select %{{.*}}, %[[PRODUCT]], %{{.*}} : f32
// CHECK: %[[SUM:.*]] = arith.addf %arg1, %[[BY_SCORE]]
// CHECK: %[[SINK:.*]] = attnjit.sink %[[SUM]] into 0[%{{.*}}] extents [16]{{$}}
// CHECK-NEXT: return %{{.*}}, %true, %{{.*}}, %[[SINK]]
func.func @both(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %h = attnjit.index h
  %t = attnjit.read 0[%h] extents [16] strides [1] : f32 -> f32
  %x = arith.mulf %s, %t : f32
  %r = arith.addf %x, %t : f32
  return %r, %true : f32, i1
}
