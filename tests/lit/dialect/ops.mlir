// RUN: attnjit-opt %s | attnjit-opt | FileCheck %s
// Every operation prints as text that parses back.

// CHECK-LABEL: func.func @ops(%arg0: f32) -> f32
func.func @ops(%score: f32) -> f32 {
  // CHECK: attnjit.index b{{$}}
  %b = attnjit.index b
  // CHECK: attnjit.index kv_idx below 4096{{$}}
  %kv = attnjit.index kv_idx below 4096
  // CHECK: attnjit.floordiv %0, %1 : i64
  %d = attnjit.floordiv %b, %kv : i64
  // CHECK: attnjit.floormod %2, %1 : i64
  %m = attnjit.floormod %d, %kv : i64
  // CHECK: attnjit.to_int %arg0
  %i = attnjit.to_int %score
  // CHECK: attnjit.read 3[%3, %4] extents [8, 1023] strides [-1, 1] in_bounds [true, false] : bf16 -> f32
  %r = attnjit.read 3[%m, %i] extents [8, 1023] strides [-1, 1] in_bounds [true, false] : bf16 -> f32
  // CHECK: attnjit.read 0[] extents [] strides [] : ui8 -> i64
  %s = attnjit.read 0[] extents [] strides [] : ui8 -> i64
  // CHECK: attnjit.gelu
  %g = attnjit.gelu %r
  // CHECK: attnjit.floor_log2 %0 : i64
  %l = attnjit.floor_log2 %b : i64
  // CHECK: attnjit.tile_end last h below 8{{$}}
  %last = attnjit.tile_end last h below 8
  return %g : f32
}
