// RUN: attnjit-opt -attnjit-score-in-log2 %s | FileCheck %s

// CHECK-LABEL: func.func @identity
// CHECK-SAME: attributes {attnjit.score_class = "identity", attnjit.score_factor = 1.4426950408889634 : f64}
// CHECK: return %arg0
func.func @identity(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  return %s, %true : f32, i1
}

// a * score + c: a stays, c is multiplied.
// CHECK-LABEL: func.func @affine
// CHECK-SAME: attnjit.score_class = "affine", attnjit.score_factor = 1.4426950408889634 : f64
// CHECK: %[[H:.*]] = arith.sitofp
// CHECK: %[[LOG2E:.*]] = arith.constant 1.4426950
// CHECK: %[[C:.*]] = arith.mulf %[[H]], %[[LOG2E]]
// CHECK: %[[THREE:.*]] = arith.constant 3.0
// CHECK: %[[A:.*]] = arith.mulf %arg0, %[[THREE]]
// CHECK: %[[R:.*]] = arith.addf %[[A]], %[[C]]
// CHECK: return %[[R]]
func.func @affine(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %h = attnjit.index h
  %c = arith.sitofp %h : i64 to f32
  %three = arith.constant 3.0 : f32
  %a = arith.mulf %s, %three : f32
  %r = arith.addf %a, %c : f32
  return %r, %true : f32, i1
}

// A choice between affine values under a condition free of the score; a literal folds.
// CHECK-LABEL: func.func @choice
// CHECK-SAME: "affine"
// CHECK: %[[C:.*]] = arith.constant 2.885390{{.*}} : f32
// CHECK: arith.select %{{.*}}, %arg0, %[[C]]
func.func @choice(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %h = attnjit.index h
  %one = arith.constant 1 : i64
  %c = arith.cmpi sge, %h, %one : i64
  %two = arith.constant 2.0 : f32
  %r = arith.select %c, %s, %two : f32
  return %r, %true : f32, i1
}

// Nonlinear: a literal factor of the value takes log2(e) in (30 * 1.4427), one of tanh's argument goes into the scale.
// CHECK-LABEL: func.func @softcap
// CHECK-SAME: attributes {attnjit.score_class = "nonlinear", attnjit.score_factor = 0.033333333333333333 : f64}
// CHECK-NOT: arith.divf
// CHECK: %[[T:.*]] = math.tanh %arg0
// CHECK: %[[K:.*]] = arith.constant 43.28084
// CHECK: %[[R:.*]] = arith.mulf %[[T]], %[[K]]
// CHECK: return %[[R]]
func.func @softcap(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %cap = arith.constant 30.0 : f32
  %d = arith.divf %s, %cap : f32
  %t = math.tanh %d : f32
  %r = arith.mulf %t, %cap : f32
  return %r, %true : f32, i1
}

// CHECK-LABEL: func.func @product
// CHECK-SAME: attnjit.score_factor = 2.500000e-01 : f64
// CHECK: math.tanh %arg0
func.func @product(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %quarter = arith.constant 0.25 : f32
  %p = arith.mulf %s, %quarter : f32
  %r = math.tanh %p : f32
  return %r, %true : f32, i1
}

// Where something else sees the quotient, or the score, the division stays what it is.
// CHECK-LABEL: func.func @seen
// CHECK-NOT: attnjit.score_factor
// CHECK: arith.divf %arg0
func.func @seen(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %cap = arith.constant 30.0 : f32
  %d = arith.divf %s, %cap : f32
  %t = math.tanh %d : f32
  %f = math.floor %d : f32
  %r = arith.addf %t, %f : f32
  return %r, %true : f32, i1
}

// CHECK-LABEL: func.func @plain_beside
// CHECK-NOT: attnjit.score_factor
// CHECK: arith.divf %arg0
func.func @plain_beside(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %cap = arith.constant 30.0 : f32
  %d = arith.divf %s, %cap : f32
  %t = math.tanh %d : f32
  %r = arith.addf %t, %s : f32
  return %r, %true : f32, i1
}

// CHECK-LABEL: func.func @capped_at_zero
// CHECK-NOT: attnjit.score_factor
// CHECK: arith.divf %arg0
func.func @capped_at_zero(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %cap = arith.constant 0.0 : f32
  %d = arith.divf %s, %cap : f32
  %r = math.tanh %d : f32
  return %r, %true : f32, i1
}

// CHECK-LABEL: func.func @square
// CHECK-SAME: "nonlinear"
func.func @square(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %r = arith.mulf %s, %s : f32
  return %r, %true : f32, i1
}

// A condition on the score wants the plain one.
// CHECK-LABEL: func.func @threshold
// CHECK-SAME: attributes {attnjit.mask_reads_score, attnjit.score_class = "identity"}
// CHECK: arith.cmpf ogt, %arg0
// CHECK: arith.mulf %arg0
func.func @threshold(%s: f32) -> (f32, i1) {
  %one = arith.constant 1.0 : f32
  %c = arith.cmpf ogt, %s, %one : f32
  return %s, %c : f32, i1
}

// The smallest float stays finite.
// CHECK-LABEL: func.func @finite
// CHECK: arith.constant -3.40282347E+38
func.func @finite(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %h = attnjit.index h
  %one = arith.constant 1 : i64
  %c = arith.cmpi sge, %h, %one : i64
  %low = arith.constant -3.40282347E+38 : f32
  %r = arith.select %c, %s, %low : f32
  return %r, %true : f32, i1
}

// A captured number may be the smallest float, too: it is held above -inf, and a captured -inf stays what it is.
// CHECK-LABEL: func.func @captured
// CHECK: %[[M:.*]] = attnjit.read
// CHECK: %[[LOW:.*]] = arith.constant -2.35865{{.*}}E+38
// CHECK: %[[BELOW:.*]] = arith.cmpf olt, %[[M]], %[[LOW]]
// CHECK: %[[CLAMPED:.*]] = arith.select %[[BELOW]], %[[LOW]], %[[M]]
// CHECK: %[[NINF:.*]] = arith.constant 0xFF800000
// CHECK: %[[IS:.*]] = arith.cmpf oeq, %[[M]], %[[NINF]]
// CHECK: %[[C:.*]] = arith.select %[[IS]], %[[M]], %[[CLAMPED]]
// CHECK: %[[P:.*]] = arith.mulf %[[C]]
// CHECK: arith.addf %arg0, %[[P]]
func.func @captured(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %q = attnjit.index q_idx
  %m = attnjit.read 0[%q] extents [64] strides [1] : f32 -> f32
  %r = arith.addf %s, %m : f32
  return %r, %true : f32, i1
}

// float16 cannot hold such numbers, and nobody multiplies a mask.
// CHECK-LABEL: func.func @harmless
// CHECK-NOT: arith.cmpf
// CHECK: return
func.func @harmless(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %q = attnjit.index q_idx
  %f = arith.sitofp %q : i64 to f32
  %m = attnjit.read 0[%q] extents [64] strides [1] : f16 -> f32
  %slope = attnjit.read 1[%q] extents [64] strides [1] : f32 -> f32
  %a = arith.mulf %slope, %f : f32
  %b = arith.addf %m, %s : f32
  %r = arith.addf %a, %b : f32
  return %r, %true : f32, i1
}
