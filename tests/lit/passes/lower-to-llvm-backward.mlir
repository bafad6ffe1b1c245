// RUN: attnjit-opt -split-input-file -attnjit-lower-to-llvm %s | FileCheck %s

// The value, and the gradient of the score; nothing else without captured gradients.
// CHECK-LABEL: llvm.func @attnjit_mod_value(%arg0: f32, %arg1: i64, %arg2: i64, %arg3: i64, %arg4: i64, %arg5: !llvm.ptr
// CHECK-SAME: alwaysinline
// CHECK-NOT: llvm.fmul
// CHECK: %[[KEEP:.*]] = llvm.icmp "sge" %arg3, %arg4
// CHECK: %[[SUM:.*]] = llvm.fadd %arg0, %arg0
// CHECK: %[[NINF:.*]] = llvm.mlir.constant(0xFF800000 : f32)
// CHECK: %[[R:.*]] = llvm.select %[[KEEP]], %[[SUM]], %[[NINF]]
// CHECK: llvm.return %[[R]] : f32
// CHECK-LABEL: llvm.func @attnjit_mod_gradient(%arg0: f32, %arg1: f32, %arg2: i64
// CHECK-SAME: alwaysinline
// CHECK-NOT: llvm.icmp
// CHECK: %[[TWO:.*]] = llvm.mlir.constant(2.0
// CHECK: %[[D:.*]] = llvm.fmul %arg1, %[[TWO]]
// CHECK: llvm.return %[[D]] : f32
// CHECK-NOT: llvm.func
func.func @score_mod(%s: f32, %g: f32) -> (f32, i1, f32) {
  %two = arith.constant 2.0 : f32
  %q = attnjit.index q_idx
  %kv = attnjit.index kv_idx
  %keep = arith.cmpi sge, %q, %kv : i64
  %sum = arith.addf %s, %s : f32
  %d = arith.mulf %g, %two : f32
  return %sum, %keep, %d : f32, i1, f32
}

// -----

// A row shift is computed for itself. Every sink has an offset in a packed tensor, and its number decides where.
// CHECK-LABEL: llvm.func @attnjit_mod_value
// CHECK-LABEL: llvm.func @attnjit_mod_gradient
// CHECK-SAME: llvm.dereferenceable = 176
// CHECK: %[[PART:.*]] = llvm.mlir.constant(4096 : i64)
// CHECK: %[[AT:.*]] = llvm.add %arg8, %[[PART]]
// CHECK: %[[P:.*]] = llvm.getelementptr inbounds %arg9[%[[AT]]] : (!llvm.ptr, i64) -> !llvm.ptr, f32
// CHECK: llvm.store %arg1, %[[P]]
// CHECK-NOT: llvm.store
// CHECK: llvm.return %arg1
// CHECK-LABEL: llvm.func @attnjit_sink_offsets(%arg0: i64, %arg1: i64, %arg2: i64, %arg3: i64, %arg4: !llvm.ptr
// CHECK-NOT: alwaysinline
// CHECK: %[[O0:.*]] = llvm.getelementptr inbounds %arg5[0]
// CHECK: llvm.store %arg1, %[[O0]]
// The second dimension's extent is the table's, and its index is clamped.
// CHECK: %[[CLAMPED:.*]] = llvm.intr.smax
// CHECK: %[[EP:.*]] = llvm.getelementptr inbounds %arg4[144]
// CHECK: %[[EXTENT:.*]] = llvm.load %[[EP]] invariant
// CHECK: %[[ROW:.*]] = llvm.mul %arg1, %[[EXTENT]]
// CHECK: %[[PLACE:.*]] = llvm.add %[[ROW]], %[[CLAMPED]]
// CHECK: %[[O1:.*]] = llvm.getelementptr inbounds %arg5[8]
// CHECK: llvm.store %[[PLACE]], %[[O1]]
// CHECK-LABEL: llvm.func @attnjit_row_shifts(%arg0: i64, %arg1: i64, %arg2: i64, %arg3: !llvm.ptr
// CHECK-SAME: %arg4: f32
// CHECK: %[[V:.*]] = llvm.fmul %arg4
// CHECK: %[[V0:.*]] = llvm.getelementptr inbounds %arg5[0]
// CHECK: llvm.store %[[V]], %[[V0]]
func.func @score_mod(%s: f32, %g: f32) -> (f32, i1, f32, f32, f32) {
  %true = arith.constant true
  %two = arith.constant 2.0 : f32
  %h = attnjit.index h
  %q = attnjit.index q_idx
  %kv = attnjit.index kv_idx
  %d = arith.subi %q, %kv : i64
  %a = attnjit.read 0[%h] extents [8] strides [1] in_bounds [true] : f32 -> f32
  %b = attnjit.read 1[%h, %d] extents [8, 99] strides [-1, 1] in_bounds [true, false] : f32 -> f32
  %a2 = arith.mulf %a, %two : f32
  %x = arith.addf %s, %a2 : f32
  %y = arith.addf %x, %b : f32
  %ga = arith.mulf %g, %two : f32
  %shift = attnjit.sink %ga into 0[%h] extents [8] in_bounds [true] row_shift
  %diagonal = attnjit.sink %g into 1[%h, %d] extents [8, 99] in_bounds [true, false]
  return %y, %true, %g, %shift, %diagonal : f32, i1, f32, f32, f32
}

// -----

// A place that the tile gives may depend on the score. The offsets leave it out.
// CHECK-LABEL: llvm.func @attnjit_mod_gradient
// CHECK: %[[INT:.*]] = llvm.call_intrinsic "llvm.fptosi.sat.i64.f32"(%arg0)
// CHECK: llvm.store %arg1
// CHECK: %[[P:.*]] = llvm.getelementptr inbounds %arg10[%{{.*}}] : (!llvm.ptr, i64) -> !llvm.ptr, i64
// CHECK: llvm.store %{{.*}}, %[[P]]
// CHECK-LABEL: llvm.func @attnjit_sink_offsets
// CHECK-NOT: llvm.store
// CHECK: llvm.return
func.func @score_mod(%s: f32, %g: f32) -> (f32, i1, f32, f32) {
  %true = arith.constant true
  %i = attnjit.to_int %s
  %r = attnjit.read 0[%i] extents [4] strides [1] : f32 -> f32
  %sink = attnjit.sink %g into 0[%i] extents [4] {attnjit.placed}
  %x = arith.addf %s, %r : f32
  return %x, %true, %g, %sink : f32, i1, f32, f32
}

// -----

// Staged reads are the tile's; a place is found without them.
// CHECK-LABEL: llvm.func @attnjit_mod_value
// CHECK: llvm.getelementptr inbounds %arg6
// CHECK-LABEL: llvm.func @attnjit_mod_gradient
// CHECK-LABEL: llvm.func @attnjit_sink_offsets
// CHECK: llvm.load %{{.*}} invariant {alignment = 4 : i64} : !llvm.ptr -> i32
// CHECK-LABEL: llvm.func @attnjit_lane_rows
func.func @score_mod(%s: f32, %g: f32) -> (f32, i1, f32, f32) {
  %true = arith.constant true
  %q = attnjit.index q_idx
  %kv = attnjit.index kv_idx
  %i = attnjit.read 0[%q, %kv] extents [64, 96] strides [-1, 1] in_bounds [true, true] staged 0 : i32 -> i64
  %r = attnjit.read 1[%i] extents [4] strides [1] : f32 -> f32
  %sink = attnjit.sink %g into 1[%i] extents [4]
  %x = arith.addf %s, %r : f32
  return %x, %true, %g, %sink : f32, i1, f32, f32
}
