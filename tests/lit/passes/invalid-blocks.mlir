// RUN: not attnjit-opt %s -allow-unregistered-dialect -attnjit-canonical-order 2>&1 | FileCheck %s
// RUN: not attnjit-opt %s -allow-unregistered-dialect -attnjit-narrow-integers 2>&1 | FileCheck %s
// RUN: not attnjit-opt %s -allow-unregistered-dialect -attnjit-stage-reads 2>&1 | FileCheck %s
// RUN: not attnjit-opt %s -allow-unregistered-dialect -attnjit-lower-to-llvm 2>&1 | FileCheck %s --check-prefix=SPLIT
// Control flow is none of ours.

// CHECK: error: 'func.func' op needs a body of one block
// SPLIT: error: 'func.func' op is not split: expected one block
func.func @branches(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  "test.jump"()[^next] : () -> ()
^next:
  return %s, %true : f32, i1
}
