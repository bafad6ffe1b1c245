// RUN: attnjit-opt -split-input-file -attnjit-lower-to-llvm %s | FileCheck %s

// CHECK-LABEL: llvm.func @attnjit_mod(%arg0: f32, %arg1: i64, %arg2: i64, %arg3: i64, %arg4: i64, %arg5: !llvm.ptr
// CHECK-SAME: llvm.dereferenceable = 0
// CHECK-SAME: alwaysinline
// A dropped element is -inf, whatever its value.
// CHECK: %[[KEEP:.*]] = llvm.icmp "sge" %arg3, %arg4
// CHECK: %[[SUM:.*]] = llvm.fadd %arg0, %arg0 {fastmathFlags = #llvm.fastmath<contract>}
// CHECK: %[[NINF:.*]] = llvm.mlir.constant(0xFF800000 : f32)
// CHECK: %[[R:.*]] = llvm.select %[[KEEP]], %[[SUM]], %[[NINF]]
// CHECK: llvm.return %[[R]] : f32
func.func @score_mod(%s: f32) -> (f32, i1) {
  %q = attnjit.index q_idx
  %kv = attnjit.index kv_idx
  %keep = arith.cmpi sge, %q, %kv : i64
  %sum = arith.addf %s, %s : f32
  return %sum, %keep : f32, i1
}

// -----

// Views are 88 bytes: data, strides from 8, extents from 48. The first index is proven, the second clamped.
// CHECK-LABEL: llvm.func @attnjit_mod
// CHECK-SAME: llvm.dereferenceable = 176
// CHECK: %[[SP:.*]] = llvm.getelementptr inbounds %arg5[96]
// CHECK: %[[STRIDE:.*]] = llvm.load %[[SP]] invariant
// CHECK: %[[ROW:.*]] = llvm.mul %arg2, %[[STRIDE]]
// CHECK: %[[EP:.*]] = llvm.getelementptr inbounds %arg5[144]
// CHECK: llvm.load %[[EP]] invariant
// CHECK: llvm.intr.smin
// CHECK: llvm.intr.smax
// CHECK: %[[DP:.*]] = llvm.getelementptr inbounds %arg5[88]
// CHECK: %[[DATA:.*]] = llvm.load %[[DP]] invariant
// CHECK: %[[P:.*]] = llvm.getelementptr inbounds %[[DATA]]
// CHECK: %[[BITS:.*]] = llvm.load %[[P]] invariant {alignment = 2 : i64} : !llvm.ptr -> i16
// CHECK: llvm.zext %[[BITS]] : i16 to i32
// CHECK: llvm.shl
// CHECK: llvm.bitcast
// CHECK-NOT: llvm.br
func.func @score_mod(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %h = attnjit.index h
  %q = attnjit.index q_idx
  %r = attnjit.read 1[%h, %q] extents [8, 64] strides [-1, 1] in_bounds [true, false] : bf16 -> f32
  return %r, %true : f32, i1
}

// -----

// Broadcast dimensions and dimensions of one element need no address.
// CHECK-LABEL: llvm.func @attnjit_mod
// CHECK-NOT: llvm.mul
// CHECK: %[[DP:.*]] = llvm.getelementptr inbounds %arg5[0]
// CHECK: %[[DATA:.*]] = llvm.load %[[DP]]
// CHECK: %[[X:.*]] = llvm.load %[[DATA]] invariant {alignment = 1 : i64} : !llvm.ptr -> i8
// CHECK: %[[ZERO:.*]] = llvm.mlir.constant(0 : i8)
// CHECK: llvm.icmp "ne" %[[X]], %[[ZERO]]
func.func @score_mod(%s: f32) -> (f32, i1) {
  %q = attnjit.index q_idx
  %r = attnjit.read 0[%q, %q] extents [8, 1] strides [0, 1] : i1 -> i1
  return %s, %r : f32, i1
}

// -----

// A divisor that would trap is replaced before the division.
// CHECK-LABEL: llvm.func @attnjit_mod
// CHECK: %[[ISZERO:.*]] = llvm.icmp "eq" %arg4
// CHECK: %[[SAFE:.*]] = llvm.select %{{.*}}, %{{.*}}, %arg4
// CHECK: llvm.sdiv %arg3, %[[SAFE]]
// CHECK: llvm.select %[[ISZERO]]
// CHECK: llvm.call_intrinsic "llvm.fptosi.sat.i64.f32"(%arg0)
func.func @score_mod(%s: f32) -> (f32, i1) {
  %q = attnjit.index q_idx
  %kv = attnjit.index kv_idx
  %d = attnjit.floordiv %q, %kv : i64
  %i = attnjit.to_int %s
  %c = arith.cmpi eq, %d, %i : i64
  return %s, %c : f32, i1
}

// -----

// A staged read takes element %arg7 of the second part of 4096 words; its address is another function, without the score.
// CHECK-LABEL: llvm.func @attnjit_mod
// CHECK-SAME: %arg5: !llvm.ptr {{.*}}, %arg6: !llvm.ptr {{.*}}, %arg7: i64)
// CHECK-NOT: %arg5
// CHECK: %[[SECOND:.*]] = llvm.mlir.constant(4096 : i64)
// CHECK: %[[ELEMENT:.*]] = llvm.add %arg7, %[[SECOND]]
// CHECK: %[[P:.*]] = llvm.getelementptr inbounds %arg6[%[[ELEMENT]]] : (!llvm.ptr, i64) -> !llvm.ptr, i32
// CHECK: %[[WORD:.*]] = llvm.load %[[P]] invariant {alignment = 4 : i64} : !llvm.ptr -> i32
// CHECK: llvm.icmp "ne" %[[WORD]]
// CHECK-LABEL: llvm.func @attnjit_lane_rows(%arg0: i64, %arg1: i64, %arg2: i64, %arg3: i64, %arg4: !llvm.ptr
// CHECK-SAME: llvm.dereferenceable = 176
// CHECK-SAME: %arg5: !llvm.ptr)
// CHECK-NOT: llvm.fadd
// CHECK: %[[SLOT:.*]] = llvm.getelementptr inbounds %arg5[256]
// CHECK: llvm.mul %arg2
// CHECK: %[[DP:.*]] = llvm.getelementptr inbounds %arg4[88]
// CHECK: %[[DATA:.*]] = llvm.load %[[DP]]
// CHECK: %[[ROW:.*]] = llvm.getelementptr inbounds %[[DATA]][{{.*}}i8
// CHECK: llvm.store %[[ROW]], %[[SLOT]]
// CHECK: llvm.return
func.func @score_mod(%s: f32) -> (f32, i1) {
  %q = attnjit.index q_idx
  %kv = attnjit.index kv_idx
  %sum = arith.addf %s, %s : f32
  %r = attnjit.read 1[%q, %kv] extents [64, 96] strides [-1, 1] in_bounds [true, true] staged 1 : i1 -> i1
  return %sum, %r : f32, i1
}

// -----

// Functions are calls, rounding and roots instructions; a minimum propagates NaN.
// CHECK: llvm.func @attnjit_mod
// CHECK: llvm.call @attnjit_tanh(%arg0)
// CHECK: llvm.intr.floor
// CHECK: llvm.intr.roundeven
// CHECK: llvm.intr.sqrt
// CHECK: llvm.intr.minimum({{.*}}) {fastmathFlags = #llvm.fastmath<nsz>}
// CHECK: llvm.func @attnjit_tanh(f32) -> f32
func.func @score_mod(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %t = math.tanh %s : f32
  %f = math.floor %t : f32
  %r = math.roundeven %f : f32
  %q = math.sqrt %r : f32
  %m = arith.minimumf %q, %s : f32
  return %m, %true : f32, i1
}

// -----

// What is known of tiles has functions of its own: a cpu::TileKindFn, and a cpu::TileRangeFn for the keys. Of queries
// nothing is known.
// CHECK-LABEL: llvm.func @attnjit_tile_kind
// CHECK-SAME: (%[[TILE:.*]]: !llvm.ptr, %{{.*}}: !llvm.ptr {{.*}}) -> i32 attributes {passthrough = ["nounwind"]} {
// CHECK-DAG: %[[KV:.*]] = llvm.getelementptr inbounds %[[TILE]][40]
// CHECK-DAG: %[[Q:.*]] = llvm.getelementptr inbounds %[[TILE]][32]
// CHECK: %[[NEVER:.*]] = llvm.icmp "sgt"
// CHECK: %[[SKIP:.*]] = llvm.mlir.constant(0 : i32)
// CHECK: llvm.select %[[NEVER]], %[[SKIP]]
// CHECK: llvm.return %{{.*}} : i32
// CHECK: llvm.func @attnjit_kv_range(%{{.*}}: !llvm.ptr, %{{.*}}: !llvm.ptr {{.*}}, %[[OUT:.*]]: !llvm.ptr {llvm.noalias}) attributes
// CHECK: llvm.store
// CHECK: %[[LAST:.*]] = llvm.getelementptr inbounds %[[OUT]][8]
// CHECK: llvm.store %{{.*}}, %[[LAST]]
// CHECK-NOT: attnjit_q_range
// CHECK-NOT: tile_facts
func.func @score_mod(%s: f32) -> (f32, i1) {
  %q = attnjit.index q_idx below 1024
  %kv = attnjit.index kv_idx below 1024
  %c = arith.cmpi sge, %q, %kv : i64
  return %s, %c : f32, i1
}
func.func @tile_facts() -> (i1, i1, i32, i32, i32, i32, i1) {
  %false = arith.constant false
  %q_first = attnjit.tile_end first q_idx below 1024
  %q_last = attnjit.tile_end last q_idx below 1024
  %kv_first = attnjit.tile_end first kv_idx below 1024
  %kv_last = attnjit.tile_end last kv_idx below 1024
  %never = arith.cmpi sgt, %kv_first, %q_last : i64
  %last = arith.minsi %kv_last, %q_last : i64
  %0 = arith.trunci %kv_first : i64 to i32
  %1 = arith.trunci %last : i64 to i32
  %2 = arith.trunci %q_first : i64 to i32
  %3 = arith.trunci %q_last : i64 to i32
  return %never, %false, %0, %1, %2, %3, %false : i1, i1, i32, i32, i32, i32, i1
}

// -----

// What is known of tiles may be all there is.
// CHECK-NOT: attnjit_mod
// CHECK-LABEL: llvm.func @attnjit_tile_kind
// CHECK-NOT: llvm.func
func.func @tile_facts() -> (i1, i1, i32, i32, i32, i32, i1) {
  %false = arith.constant false
  %q_first = attnjit.tile_end first q_idx below 1024
  %q_last = attnjit.tile_end last q_idx below 1024
  %kv_first = attnjit.tile_end first kv_idx below 1024
  %kv_last = attnjit.tile_end last kv_idx below 1024
  %never = arith.cmpi sgt, %kv_first, %q_last : i64
  %0 = arith.trunci %kv_first : i64 to i32
  %1 = arith.trunci %kv_last : i64 to i32
  %2 = arith.trunci %q_first : i64 to i32
  %3 = arith.trunci %q_last : i64 to i32
  return %never, %false, %0, %1, %2, %3, %false : i1, i1, i32, i32, i32, i32, i1
}
