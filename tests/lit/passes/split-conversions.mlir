// RUN: attnjit-opt %s --attnjit-split-conversions | FileCheck %s

// CHECK-LABEL: @sum
// CHECK: %[[Q:.*]] = arith.trunci
// CHECK: %[[KV:.*]] = arith.trunci
// CHECK: %[[A:.*]] = arith.sitofp %[[Q]] : i32 to f32
// CHECK: %[[B:.*]] = arith.sitofp %[[KV]] : i32 to f32
// CHECK: arith.addf %[[A]], %[[B]] : f32
// CHECK-NOT: arith.sitofp
func.func @sum(%s: f32) -> (f32, i1) {
  %keep = arith.constant true
  %q64 = attnjit.index q_idx below 1024
  %k64 = attnjit.index kv_idx below 1024
  %q = arith.trunci %q64 : i64 to i32
  %k = arith.trunci %k64 : i64 to i32
  %d = arith.addi %q, %k overflow<nsw> : i32
  %f = arith.sitofp %d : i32 to f32
  %r = arith.addf %s, %f : f32
  return %r, %keep : f32, i1
}

// Beyond 2^24 a float holds no more every integer: the sum of the rounded is not the rounded sum.
// CHECK-LABEL: @large
// CHECK: %[[D:.*]] = arith.addi
// CHECK: arith.sitofp %[[D]] : i32 to f32
func.func @large(%s: f32) -> (f32, i1) {
  %keep = arith.constant true
  %q64 = attnjit.index q_idx below 33554432
  %k64 = attnjit.index kv_idx below 1024
  %q = arith.trunci %q64 : i64 to i32
  %k = arith.trunci %k64 : i64 to i32
  %d = arith.addi %q, %k overflow<nsw> : i32
  %f = arith.sitofp %d : i32 to f32
  %r = arith.addf %s, %f : f32
  return %r, %keep : f32, i1
}

// Nothing is gained behind a division of both, or where one conversion per row does.
// CHECK-LABEL: @others
// CHECK: %[[D:.*]] = attnjit.floordiv
// CHECK: arith.sitofp %[[D]] : i32 to f32
// CHECK: %[[S:.*]] = arith.addi
// CHECK: arith.sitofp %[[S]] : i32 to f32
func.func @others(%s: f32) -> (f32, i1) {
  %keep = arith.constant true
  %q64 = attnjit.index q_idx below 1024
  %k64 = attnjit.index kv_idx below 1024
  %h64 = attnjit.index h below 8
  %q = arith.trunci %q64 : i64 to i32
  %k = arith.trunci %k64 : i64 to i32
  %h = arith.trunci %h64 : i64 to i32
  %d = arith.addi %q, %k overflow<nsw> : i32
  %c = arith.constant 7 : i32
  %e = attnjit.floordiv %d, %c : i32
  %f = arith.sitofp %e : i32 to f32
  %t = arith.addi %q, %h overflow<nsw> : i32
  %g = arith.sitofp %t : i32 to f32
  %r = arith.addf %g, %f : f32
  return %r, %keep : f32, i1
}

// The difference of the positions varies in one way; what is added to it may vary in another.
// CHECK-LABEL: @difference
// CHECK: %[[D:.*]] = arith.subi
// CHECK: %[[E:.*]] = arith.addi %[[D]]
// CHECK: %[[F:.*]] = arith.sitofp %[[E]] : i32 to f32
// CHECK: %[[A:.*]] = arith.sitofp %[[D]] : i32 to f32
// CHECK: %[[B:.*]] = arith.sitofp %{{.*}} : i32 to f32
// CHECK: arith.mulf %[[A]], %[[B]] : f32
func.func @difference(%s: f32) -> (f32, i1) {
  %keep = arith.constant true
  %q64 = attnjit.index q_idx below 1024
  %k64 = attnjit.index kv_idx below 1024
  %h64 = attnjit.index h below 8
  %q = arith.trunci %q64 : i64 to i32
  %k = arith.trunci %k64 : i64 to i32
  %h = arith.trunci %h64 : i64 to i32
  %d = arith.subi %q, %k overflow<nsw> : i32
  %e = arith.addi %d, %h overflow<nsw> : i32
  %f = arith.sitofp %e : i32 to f32
  %p = arith.muli %d, %q overflow<nsw> : i32
  %g = arith.sitofp %p : i32 to f32
  %r = arith.addf %g, %f : f32
  return %r, %keep : f32, i1
}
