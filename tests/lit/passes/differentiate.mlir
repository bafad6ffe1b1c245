// RUN: attnjit-opt -pass-pipeline='builtin.module(func.func(attnjit-differentiate{gradients=3},canonicalize,cse))' %s | FileCheck %s
// The gradients beside value and keep: dscore, then one sink per contribution to captured tensors 0 and 1.

// A score that is only added to hands its gradient on; what is the same along a row is a row shift.
// CHECK-LABEL: func.func @additive(%arg0: f32, %arg1: f32) -> (f32, i1, f32, f32, f32)
// CHECK: %[[H:.*]] = attnjit.index h
// CHECK: %[[Q:.*]] = attnjit.index q_idx
// CHECK: %[[K:.*]] = attnjit.index kv_idx
// CHECK: %[[ROW:.*]] = attnjit.sink %arg1 into 0[%[[H]], %[[Q]]] extents [8, 16] row_shift
// CHECK: %[[COLUMN:.*]] = attnjit.sink %arg1 into 1[%[[K]]] extents [16]
// CHECK: return %{{.*}}, %true, %arg1, %[[ROW]], %[[COLUMN]]
func.func @additive(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %h = attnjit.index h
  %q = attnjit.index q_idx
  %k = attnjit.index kv_idx
  %row = attnjit.read 0[%h, %q] extents [8, 16] strides [-1, 1] : f32 -> f32
  %column = attnjit.read 1[%k] extents [16] strides [1] : bf16 -> f32
  %unwanted = attnjit.read 2[%k] extents [16] strides [1] : bf16 -> f32
  %x = arith.addf %s, %row : f32
  %y = arith.addf %x, %column : f32
  %r = arith.addf %y, %unwanted : f32
  return %r, %true : f32, i1
}
