// RUN: attnjit-opt %s -split-input-file -verify-diagnostics -pass-pipeline='builtin.module(func.func(attnjit-dropped-elements))'
// attnjit-dropped-elements refuses what is no score_mod.

// expected-error@+1 {{is no score_mod: expected one block and the type (f32) -> f32, got '(f32) -> i1'}}
func.func @mask(%s: f32) -> i1 {
  %c = arith.cmpf oeq, %s, %s : f32
  return %c : i1
}

// -----

// expected-error@+1 {{is no score_mod}}
func.func @two_scores(%s: f32, %t: f32) -> f32 {
  return %s : f32
}
