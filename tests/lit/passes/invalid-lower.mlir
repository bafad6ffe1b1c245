// RUN: attnjit-opt %s -split-input-file -verify-diagnostics -attnjit-lower-to-llvm

func.func @unknown(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  // expected-error@+1 {{'math.atan' op has no lowering}}
  %r = math.atan %s : f32
  return %r, %true : f32, i1
}

// -----

// expected-error@+1 {{expected one function}}
module {
  func.func private @f(%s: f32) -> (f32, i1)
  func.func private @g(%s: f32) -> (f32, i1)
}

// -----

func.func @score_mod(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  return %s, %true : f32, i1
}
// expected-error@+1 {{needs one block and the type () -> (i1, i1, i32, i32, i32, i32, i1)}}
func.func @tile_facts() -> i1 {
  %true = arith.constant true
  return %true : i1
}

// -----

func.func @staged_by_score(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  // expected-error@+1 {{feeds a staged read but depends on the score}}
  %i = attnjit.to_int %s
  %r = attnjit.read 0[%i] extents [4] strides [1] staged 0 : f32 -> f32
  return %r, %true : f32, i1
}

// -----

func.func @no_sink(%s: f32, %g: f32) -> (f32, i1, f32, f32) {
  %true = arith.constant true
  // expected-error@-2 {{returns what is no sink behind the gradient of the score}}
  return %s, %true, %g, %g : f32, i1, f32, f32
}

// -----

func.func @placed_by_score(%s: f32, %g: f32) -> (f32, i1, f32, f32) {
  %true = arith.constant true
  // expected-error@+1 {{feeds a sink's index but depends on the score}}
  %i = attnjit.to_int %s
  %sink = attnjit.sink %g into 0[%i] extents [4]
  return %s, %true, %g, %sink : f32, i1, f32, f32
}

// -----

func.func @shift_by_score(%s: f32, %g: f32) -> (f32, i1, f32, f32) {
  %true = arith.constant true
  %h = attnjit.index h
  // expected-error@+1 {{feeds a row shift but depends on the score}}
  %x = arith.mulf %g, %s : f32
  %sink = attnjit.sink %x into 0[%h] extents [4] row_shift
  return %s, %true, %g, %sink : f32, i1, f32, f32
}

// -----

func.func @shift_by_key(%s: f32, %g: f32) -> (f32, i1, f32, f32) {
  %true = arith.constant true
  %kv = attnjit.index kv_idx
  %h = attnjit.index h
  // expected-error@+1 {{feeds a row shift but depends on kv_idx}}
  %f = arith.sitofp %kv : i64 to f32
  %x = arith.mulf %g, %f : f32
  %sink = attnjit.sink %x into 0[%h] extents [4] row_shift
  return %s, %true, %g, %sink : f32, i1, f32, f32
}
