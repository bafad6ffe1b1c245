// RUN: attnjit-opt -attnjit-narrow-integers %s | FileCheck %s
// RUN: attnjit-opt %s --attnjit-narrow-integers=addresses=true | FileCheck %s --check-prefix=CUDA

// CHECK-LABEL: func.func @fits
// CHECK-SAME: attributes {attnjit.fits_32}
// CHECK-DAG: %[[Q:.*]] = arith.trunci %{{.*}} : i64 to i32
// CHECK-DAG: %[[KV:.*]] = arith.trunci %{{.*}} : i64 to i32
// CHECK: %[[D:.*]] = arith.subi %[[Q]], %[[KV]] overflow<nsw> : i32
// CHECK: arith.sitofp %[[D]] : i32 to f32
// CHECK: arith.cmpi sge, %[[Q]], %[[KV]] : i32
func.func @fits() -> (f32, i1) {
  %q = attnjit.index q_idx below 65536
  %kv = attnjit.index kv_idx below 65536
  %d = arith.subi %q, %kv : i64
  %f = arith.sitofp %d : i64 to f32
  %c = arith.cmpi sge, %q, %kv : i64
  return %f, %c : f32, i1
}

// 65536 * 65536 does not: the product and what comes of it stay wide.
// CHECK-LABEL: func.func @does_not_fit
// CHECK-NOT: attnjit.fits_32
// CHECK: %[[P:.*]] = arith.muli %{{.*}} : i64
// CHECK: arith.sitofp %[[P]] : i64 to f32
func.func @does_not_fit() -> f32 {
  %q = attnjit.index q_idx below 65537
  %kv = attnjit.index kv_idx below 65537
  %p = arith.muli %q, %kv : i64
  %f = arith.sitofp %p : i64 to f32
  return %f : f32
}

// Above 2^31 a value fits in 32 unsigned bits only; maxsi is signed.
// CHECK-LABEL: func.func @unsigned_is_not_enough
// CHECK: arith.maxsi %{{.*}} : i64
func.func @unsigned_is_not_enough() -> f32 {
  %q = attnjit.index q_idx below 4000000000
  %kv = attnjit.index kv_idx below 4000000000
  %m = arith.maxsi %q, %kv : i64
  %f = arith.sitofp %m : i64 to f32
  return %f : f32
}

// Addresses stay wide; a division is narrow for them, too.
// For CUDA they are narrow, too.
// CUDA-LABEL: func.func @addresses
// CUDA: %[[S:.*]] = arith.addi %{{.*}} overflow<nsw> : i32
// CUDA: %[[W:.*]] = arith.extsi %[[S]] : i32 to i64
// CUDA: attnjit.read 0[%[[W]], %{{.*}}]
// CHECK-LABEL: func.func @addresses
// CHECK: %[[S:.*]] = arith.addi %{{.*}} : i64
// CHECK: %[[D:.*]] = attnjit.floordiv %{{.*}} : i32
// CHECK: %[[W:.*]] = arith.extsi %[[D]] : i32 to i64
// CHECK: attnjit.read 0[%[[S]], %[[W]]]
func.func @addresses() -> f32 {
  %q = attnjit.index q_idx below 1024
  %kv = attnjit.index kv_idx below 1024
  %c7 = arith.constant 7 : i64
  %s = arith.addi %q, %kv : i64
  %d = attnjit.floordiv %q, %c7 : i64
  %r = attnjit.read 0[%s, %d] extents [64, 64] strides [-1, 1] : f32 -> f32
  return %r : f32
}

// The smallest 32-bit integer divided by -1 does not fit.
// CHECK-LABEL: func.func @division_wraps
// CHECK: attnjit.floordiv %{{.*}} : i64
func.func @division_wraps(%i: i64) -> f32 {
  %x = attnjit.read 0[%i] extents [64] strides [1] : i32 -> i64
  %m1 = arith.constant -1 : i64
  %d = attnjit.floordiv %x, %m1 : i64
  %f = arith.sitofp %d : i64 to f32
  return %f : f32
}

// What is cut to 32 bits is computed in them where it fits, and only there.
// CHECK-LABEL: func.func @truncated
// CHECK: %[[S:.*]] = arith.minsi %{{.*}} : i32
// CHECK: %[[W:.*]] = arith.addi %{{.*}} : i64
// CHECK: %[[T:.*]] = arith.trunci %[[W]] : i64 to i32
// CHECK: return %[[S]], %[[T]]
func.func @truncated(%wide: i64) -> (i32, i32) {
  %q = attnjit.tile_end first q_idx below 1024
  %kv = attnjit.tile_end last kv_idx below 1024
  %s = arith.minsi %q, %kv : i64
  %t = arith.trunci %s : i64 to i32
  %w = arith.addi %q, %wide : i64
  %u = arith.trunci %w : i64 to i32
  return %t, %u : i32, i32
}

// CHECK-LABEL: func.func @floor_log2
// CHECK: attnjit.floor_log2 %{{.*}} : i32
func.func @floor_log2() -> i1 {
  %q = attnjit.index q_idx below 1024
  %zero = arith.constant 0 : i64
  %n = attnjit.floor_log2 %q : i64
  %c = arith.cmpi eq, %n, %zero : i64
  return %c : i1
}
