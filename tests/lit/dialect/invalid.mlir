// RUN: attnjit-opt %s -split-input-file -verify-diagnostics
// What the verifiers refuse.

func.func @empty_extent() -> i64 {
  // expected-error@+1 {{needs an extent of at least 1, got 0}}
  %0 = attnjit.index q_idx below 0
  return %0 : i64
}

// -----

func.func @empty_tile() -> i64 {
  // expected-error@+1 {{needs an extent of at least 1, got 0}}
  %0 = attnjit.tile_end first kv_idx below 0
  return %0 : i64
}

// -----

func.func @capture_number(%i: i64) -> f32 {
  // expected-error@+1 {{reads capture 16, allowed are 0 to 15}}
  %0 = attnjit.read 16[%i] extents [4] strides [1] : f32 -> f32
  return %0 : f32
}

// -----

func.func @rank(%i: i64) -> f32 {
  // expected-error@+1 {{has 6 indices, allowed are up to 5}}
  %0 = attnjit.read 0[%i, %i, %i, %i, %i, %i] extents [1, 1, 1, 1, 1, 1] strides [1, 1, 1, 1, 1, 1] : f32 -> f32
  return %0 : f32
}

// -----

func.func @counts(%i: i64) -> f32 {
  // expected-error@+1 {{needs one extent, stride and in_bounds flag per index}}
  %0 = attnjit.read 0[%i] extents [4, 4] strides [1] : f32 -> f32
  return %0 : f32
}

// -----

func.func @zero_extent(%i: i64) -> f32 {
  // expected-error@+1 {{needs extents of at least 1, got 0}}
  %0 = attnjit.read 0[%i] extents [0] strides [1] : f32 -> f32
  return %0 : f32
}

// -----

func.func @stride(%i: i64) -> f32 {
  // expected-error@+1 {{needs strides of 0, 1 or -1 (any), got 2}}
  %0 = attnjit.read 0[%i] extents [4] strides [2] : f32 -> f32
  return %0 : f32
}

// -----

func.func @element(%i: i64) -> f32 {
  // expected-error@+1 {{cannot read elements of type 'f64'}}
  %0 = attnjit.read 0[%i] extents [4] strides [1] : f64 -> f32
  return %0 : f32
}

// -----

func.func @result(%i: i64) -> i64 {
  // expected-error@+1 {{reads 'bf16' as f32, i64 or i1 by kind, not as 'i64'}}
  %0 = attnjit.read 0[%i] extents [4] strides [1] : bf16 -> i64
  return %0 : i64
}

// -----

func.func @mixed_widths(%a: i64, %b: i32) -> i64 {
  // expected-error@+1 {{requires the same type for all operands and results}}
  %0 = "attnjit.floordiv"(%a, %b) : (i64, i32) -> i64
  return %0 : i64
}

// -----

func.func @staged(%i: i64) -> f32 {
  // expected-error@+1 {{is staged as 2, allowed are 0 to 1}}
  %0 = attnjit.read 0[%i] extents [4] strides [1] staged 2 : f32 -> f32
  return %0 : f32
}
