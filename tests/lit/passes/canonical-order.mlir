// RUN: attnjit-opt -attnjit-canonical-order %s | FileCheck %s
// One text for spellings that differ in order and polarity.

// The score first, then indices, reads, everything else, constants last.
// CHECK-LABEL: func.func @operands
// CHECK: %[[T:.*]] = math.tanh %arg0
// CHECK: arith.addf %arg0, %[[T]]
// CHECK-DAG: %[[Q:.*]] = attnjit.index q_idx
// CHECK-DAG: %[[KV:.*]] = attnjit.index kv_idx
// CHECK: arith.muli %[[Q]], %[[KV]]
func.func @operands(%s: f32) -> (f32, i64) {
  %kv = attnjit.index kv_idx
  %q = attnjit.index q_idx
  %product = arith.muli %kv, %q : i64
  %t = math.tanh %s : f32
  %sum = arith.addf %t, %s : f32
  return %sum, %product : f32, i64
}

// Comparisons are turned with their operands; against literals they are not strict.
// CHECK-LABEL: func.func @comparisons
// CHECK-DAG: %[[Q:.*]] = attnjit.index q_idx
// CHECK-DAG: %[[KV:.*]] = attnjit.index kv_idx
// CHECK: %[[A:.*]] = arith.cmpi sge, %[[Q]], %[[KV]]
// CHECK: %[[FIVE:.*]] = arith.constant 5
// CHECK: %[[B:.*]] = arith.cmpi sge, %[[Q]], %[[FIVE]]
// CHECK: %[[C:.*]] = arith.cmpf ogt, %arg0
// CHECK: return %[[A]], %[[A2:.*]], %[[B]], %[[B2:.*]], %[[C]]
func.func @comparisons(%s: f32) -> (i1, i1, i1, i1, i1) {
  %kv = attnjit.index kv_idx
  %q = attnjit.index q_idx
  %true = arith.constant true
  %four = arith.constant 4 : i64
  %two = arith.constant 2.0 : f32
  %a = arith.cmpi sle, %kv, %q : i64
  %less = arith.cmpi slt, %q, %kv : i64
  %a2 = arith.xori %less, %true : i1
  %b = arith.cmpi slt, %four, %q : i64
  %at_most = arith.cmpi sle, %q, %four : i64
  %b2 = arith.xori %at_most, %true : i1
  %c = arith.cmpf olt, %two, %s : f32
  return %a, %a2, %b, %b2, %c : i1, i1, i1, i1, i1
}

// The inverse of an ordered comparison of floats is unordered: NaN must keep its side.
// CHECK-LABEL: func.func @float_inverse
// CHECK: %[[C:.*]] = arith.cmpf uge, %arg0
// CHECK: return %[[C]]
func.func @float_inverse(%s: f32) -> i1 {
  %true = arith.constant true
  %two = arith.constant 2.0 : f32
  %c = arith.cmpf olt, %s, %two : f32
  %n = arith.xori %c, %true : i1
  return %n : i1
}

// CHECK-LABEL: func.func @selects
// CHECK: %[[C:.*]] = arith.cmpi sge
// CHECK: arith.select %[[C]], %arg0, %{{.*}} : f32
// CHECK: %[[E:.*]] = arith.cmpi eq
// CHECK: arith.select %[[E]], %arg0, %{{.*}} : f32
func.func @selects(%s: f32) -> (f32, f32) {
  %kv = attnjit.index kv_idx
  %q = attnjit.index q_idx
  %one = arith.constant 1.0 : f32
  %c = arith.cmpi slt, %q, %kv : i64
  %r = arith.select %c, %one, %s : f32
  %n = arith.cmpi ne, %q, %kv : i64
  %t = arith.select %n, %one, %s : f32
  return %r, %t : f32, f32
}

// At the end of the integers neither a comparison nor its inverse has the preferred form: left alone.
// CHECK-LABEL: func.func @ends
// CHECK: %[[C:.*]] = arith.cmpi sgt
// CHECK: arith.select %[[C]], %{{.*}}, %arg0
func.func @ends(%s: f32) -> f32 {
  %q = attnjit.index q_idx
  %max = arith.constant 9223372036854775807 : i64
  %one = arith.constant 1.0 : f32
  %c = arith.cmpi sgt, %q, %max : i64
  %r = arith.select %c, %one, %s : f32
  return %r : f32
}

// x + 0, x - 0: the sign of a zero is not observable. x - c is x + -c, x / 4 is x * 0.25, both exactly.
// CHECK-LABEL: func.func @literals
// CHECK-DAG: %[[M3:.*]] = arith.constant -3.0
// CHECK-DAG: arith.addf %arg0, %[[M3]]
// CHECK-DAG: %[[QUARTER:.*]] = arith.constant 2.5{{0*}}e-01
// CHECK-DAG: arith.mulf %arg0, %[[QUARTER]]
// CHECK: return %arg0, %arg0
func.func @literals(%s: f32) -> (f32, f32, f32, f32) {
  %zero = arith.constant 0.0 : f32
  %three = arith.constant 3.0 : f32
  %four = arith.constant 4.0 : f32
  %a = arith.addf %zero, %s : f32
  %b = arith.subf %s, %zero : f32
  %c = arith.subf %s, %three : f32
  %d = arith.divf %s, %four : f32
  return %a, %b, %c, %d : f32, f32, f32, f32
}

// Operations follow the order in which the result needs them, and what it does not need goes.
// CHECK-LABEL: func.func @schedule
// CHECK-NEXT: math.exp
// CHECK-NEXT: math.log
// CHECK-NEXT: arith.subf
// CHECK-NEXT: return
func.func @schedule(%s: f32) -> f32 {
  %log = math.log %s : f32
  %dead = math.tanh %s : f32
  %exp = math.exp %s : f32
  %r = arith.subf %exp, %log : f32
  return %r : f32
}
