// RUN: attnjit-opt %s -verify-diagnostics -pass-pipeline='builtin.module(func.func(attnjit-score-in-log2))'

// expected-error@+1 {{is not split: expected one block and the type (f32) -> (f32, i1), got '(f32) -> f32'}}
func.func @score_mod(%s: f32) -> f32 {
  return %s : f32
}
