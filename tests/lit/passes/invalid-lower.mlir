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
