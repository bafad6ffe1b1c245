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

func.func @staged_by_score(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  // expected-error@+1 {{feeds a staged read but depends on the score}}
  %i = attnjit.to_int %s
  %r = attnjit.read 0[%i] extents [4] strides [1] staged 0 : f32 -> f32
  return %r, %true : f32, i1
}
