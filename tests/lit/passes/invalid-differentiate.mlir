// RUN: attnjit-opt %s -split-input-file -verify-diagnostics -pass-pipeline='builtin.module(func.func(attnjit-differentiate))'
// attnjit-differentiate refuses what is not split, and operations that it knows no derivative of.

// expected-error@+1 {{is not split: expected one block and the type (f32) -> (f32, i1), got '(f32) -> f32'}}
func.func @whole(%s: f32) -> f32 {
  return %s : f32
}

// -----

// expected-error@+1 {{is not split}}
func.func @done(%s: f32, %g: f32) -> (f32, i1, f32) {
  %true = arith.constant true
  return %s, %true, %g : f32, i1, f32
}

// -----

func.func @unknown(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  // expected-error@+1 {{'math.cbrt' op has no derivative}}
  %r = math.cbrt %s : f32
  return %r, %true : f32, i1
}

// -----

func.func @half_a_clamp(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %one = arith.constant 1.0 : f32
  // expected-error@+1 {{is marked as a clamp's but is no minimum of its maximum}}
  %r = arith.minimumf %s, %one {attnjit.clamp = 0} : f32
  return %r, %true : f32, i1
}
