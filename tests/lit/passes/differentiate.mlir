// RUN: attnjit-opt -pass-pipeline='builtin.module(func.func(attnjit-differentiate{gradients=3},canonicalize,cse))' %s | FileCheck %s
// The gradients beside value and keep: dscore, then one sink per contribution to captured tensors 0 and 1.

// A score that is only added to hands its gradient on; what is the same along a row is a row shift.
// CHECK-LABEL: func.func @additive(%arg0: f32, %arg1: f32) -> (f32, i1, f32, f32, f32)
// CHECK: %[[H:.*]] = attnjit.index h
// CHECK: %[[Q:.*]] = attnjit.index q_idx
// CHECK: %[[K:.*]] = attnjit.index kv_idx
// CHECK: %[[ROW:.*]] = attnjit.sink %arg1 into 0[%[[H]], %[[Q]]] extents [8, 16] row_shift
// CHECK: %[[COLUMN:.*]] = attnjit.sink %arg1 into 1[%[[K]]] extents [16]
// CHECK: return %{{.*}}, %true, %arg1, %[[ROW]], %[[COLUMN]]
func.func @additive(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %h = attnjit.index h
  %q = attnjit.index q_idx
  %k = attnjit.index kv_idx
  %row = attnjit.read 0[%h, %q] extents [8, 16] strides [-1, 1] : f32 -> f32
  %column = attnjit.read 1[%k] extents [16] strides [1] : bf16 -> f32
  %unwanted = attnjit.read 2[%k] extents [16] strides [1] : bf16 -> f32
  %x = arith.addf %s, %row : f32
  %y = arith.addf %x, %column : f32
  %r = arith.addf %y, %unwanted : f32
  return %r, %true : f32, i1
}

// A factor that may be infinite or NaN: nothing stays nothing.
// CHECK-LABEL: func.func @factor
// CHECK: %[[ZERO:.*]] = arith.constant 0.0
// CHECK: %[[G:.*]] = attnjit.read 0
// CHECK: %[[N:.*]] = arith.sitofp
// CHECK: %[[BY_INT:.*]] = arith.mulf %arg1, %[[N]]
// CHECK: %[[ANY:.*]] = arith.cmpf une, %arg1, %[[ZERO]]
// CHECK: %[[BY_READ:.*]] = arith.mulf %arg1, %[[G]]
// CHECK: %[[CHOSEN:.*]] = arith.select %[[ANY]], %[[BY_READ]], %[[ZERO]]
// CHECK: %[[D:.*]] = arith.addf %[[BY_INT]], %[[CHOSEN]]
// CHECK: return %{{.*}}, %true, %[[D]], %{{.*}} : f32, i1, f32, f32
func.func @factor(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %h = attnjit.index h
  %g = attnjit.read 0[%h] extents [8] strides [1] : f32 -> f32
  %n = arith.sitofp %h : i64 to f32
  %x = arith.mulf %s, %g : f32
  %y = arith.mulf %s, %n : f32
  %r = arith.addf %x, %y : f32
  return %r, %true : f32, i1
}

// Nothing known to be finite: no condition.
// CHECK-LABEL: func.func @finite
// CHECK-NOT: arith.select
// CHECK: return
func.func @finite(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %half = arith.constant 0.5 : f32
  %q = attnjit.index q_idx
  %n = arith.sitofp %q : i64 to f32
  %t = math.tanh %n : f32
  %u = arith.mulf %t, %half : f32
  %r = arith.mulf %s, %u : f32
  return %r, %true : f32, i1
}

// Literals meet in one product, here in none.
// CHECK-LABEL: func.func @soft_cap
// CHECK: %[[T:.*]] = math.tanh
// CHECK: arith.mulf %[[T]], %{{.*}} : f32
// CHECK: %[[SQUARE:.*]] = arith.mulf %[[T]], %[[T]] : f32
// CHECK: %[[SLOPE:.*]] = arith.subf %{{.*}}, %[[SQUARE]] : f32
// CHECK: %[[ANY:.*]] = arith.cmpf une, %arg1
// CHECK: %[[P:.*]] = arith.mulf %arg1, %[[SLOPE]] : f32
// CHECK-NEXT: %[[D:.*]] = arith.select %[[ANY]], %[[P]], %{{.*}} : f32
// CHECK-NEXT: return %{{.*}}, %true, %[[D]]
func.func @soft_cap(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %c = arith.constant 30.0 : f32
  %x = arith.divf %s, %c : f32
  %t = math.tanh %x : f32
  %r = arith.mulf %t, %c : f32
  return %r, %true : f32, i1
}

// where(score > 0, log(score), score): the derivative of the logarithm counts where it was chosen.
// CHECK-LABEL: func.func @choice
// CHECK: %[[C:.*]] = arith.cmpf ogt, %arg0
// CHECK: %[[ANY:.*]] = arith.cmpf une, %arg1
// CHECK: %[[Q:.*]] = arith.divf %arg1, %arg0
// CHECK: %[[LOG:.*]] = arith.select %[[ANY]], %[[Q]], %{{.*}} : f32
// CHECK: %[[D:.*]] = arith.select %[[C]], %[[LOG]], %arg1 : f32
// CHECK: return %{{.*}}, %true, %[[D]]
func.func @choice(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %zero = arith.constant 0.0 : f32
  %c = arith.cmpf ogt, %s, %zero : f32
  %log = math.log %s : f32
  %r = arith.select %c, %log, %s : f32
  return %r, %true : f32, i1
}

// One of two choices, the other one elsewhere: 0 there.
// CHECK-LABEL: func.func @nested_choice
// CHECK: %[[A:.*]] = arith.cmpf ogt, %arg0
// CHECK: %[[B:.*]] = arith.cmpf olt, %arg0
// CHECK: %[[BOTH:.*]] = arith.andi %[[A]], %[[B]]
// CHECK: %[[D:.*]] = arith.select %[[BOTH]], %arg1, %{{.*}} : f32
// CHECK: return %{{.*}}, %true, %[[D]]
func.func @nested_choice(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %zero = arith.constant 0.0 : f32
  %one = arith.constant 1.0 : f32
  %a = arith.cmpf ogt, %s, %zero : f32
  %b = arith.cmpf olt, %s, %one : f32
  %x = arith.select %b, %s, %one : f32
  %r = arith.select %a, %x, %zero : f32
  return %r, %true : f32, i1
}

// What was multiplied away stays away: tanh(1 / score) beside score 0.
// CHECK-LABEL: func.func @saturated
// CHECK: %[[ANY:.*]] = arith.cmpf une, %arg1
// CHECK: %[[P:.*]] = arith.mulf %arg1, %{{.*}} : f32
// CHECK: %[[STILL:.*]] = arith.cmpf une, %[[P]]
// CHECK: %[[BOTH:.*]] = arith.andi %[[ANY]], %[[STILL]]
// CHECK: %[[D:.*]] = arith.select %[[BOTH]]
// CHECK: return %{{.*}}, %true, %[[D]]
func.func @saturated(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %one = arith.constant 1.0 : f32
  %x = arith.divf %one, %s : f32
  %r = math.tanh %x : f32
  return %r, %true : f32, i1
}

// A tie gives a half to each, NaN all to each.
// CHECK-LABEL: func.func @maximum
// CHECK: %[[H:.*]] = arith.constant 5.000000e-01
// CHECK: %[[CHOSEN:.*]] = arith.cmpf uge, %arg0, %[[G:.*]] : f32
// CHECK: %[[TIE:.*]] = arith.cmpf oeq, %arg0, %[[G]] : f32
// CHECK: %[[HALF:.*]] = arith.mulf %arg1, %[[H]]
// CHECK: %[[TO:.*]] = arith.select %[[TIE]], %[[HALF]], %arg1
// CHECK: %[[OTHER:.*]] = arith.cmpf uge, %[[G]], %arg0
// CHECK: %[[D:.*]] = arith.select %[[CHOSEN]], %[[TO]]
// CHECK: %[[V:.*]] = arith.select %[[OTHER]]
// CHECK: %[[SINK:.*]] = attnjit.sink %[[V]] into 0[]
// CHECK: return %{{.*}}, %true, %[[D]], %[[SINK]]
func.func @maximum(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %g = attnjit.read 0[] extents [] strides [] : f32 -> f32
  %r = arith.maximumf %s, %g : f32
  return %r, %true : f32, i1
}

// relu is no maximum: a tie and NaN give nothing. Its mark goes.
// CHECK-LABEL: func.func @relu
// CHECK-NOT: attnjit.relu
// CHECK: %[[C:.*]] = arith.cmpf ogt, %arg0, %[[ZERO:.*]] : f32
// CHECK: %[[D:.*]] = arith.select %[[C]], %arg1, %[[ZERO]]
// CHECK: return %{{.*}}, %true, %[[D]]
func.func @relu(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %zero = arith.constant 0.0 : f32
  %r = arith.maximumf %s, %zero {attnjit.relu} : f32
  return %r, %true : f32, i1
}

// CHECK-LABEL: func.func @clamp
// CHECK-NOT: attnjit.clamp
// CHECK: %[[LO:.*]] = attnjit.read 0
// CHECK: %[[HI:.*]] = attnjit.read 1
// CHECK: %[[ABOVE:.*]] = arith.cmpf oge, %arg0, %[[LO]]
// CHECK: %[[BELOW:.*]] = arith.cmpf ole, %arg0, %[[HI]]
// CHECK: %[[WITHIN:.*]] = arith.andi %[[ABOVE]], %[[BELOW]]
// CHECK: %[[UNDER:.*]] = arith.cmpf olt, %arg0, %[[LO]]
// CHECK: %[[ORDER:.*]] = arith.cmpf olt, %[[LO]], %[[HI]]
// CHECK: %[[TO_LO:.*]] = arith.andi %[[UNDER]], %[[ORDER]]
// CHECK: %[[CROSSED:.*]] = arith.cmpf olt, %[[HI]], %[[LO]]
// CHECK: %[[NUMBER:.*]] = arith.cmpf ord, %arg0, %arg0
// CHECK: %[[BOTH:.*]] = arith.andi %[[CROSSED]], %[[NUMBER]]
// CHECK: %[[OVER:.*]] = arith.cmpf ogt, %arg0, %[[HI]]
// CHECK: %[[TO_HI:.*]] = arith.ori %[[OVER]], %[[BOTH]]
// CHECK: %[[D:.*]] = arith.select %[[WITHIN]], %arg1
// CHECK: %[[V:.*]] = arith.select %[[TO_LO]], %arg1
// CHECK: %[[SINK:.*]] = attnjit.sink %[[V]] into 0[]
// CHECK: %[[W:.*]] = arith.select %[[TO_HI]], %arg1
// CHECK: %[[SECOND:.*]] = attnjit.sink %[[W]] into 1[]
// CHECK: return %{{.*}}, %true, %[[D]], %[[SINK]], %[[SECOND]]
func.func @clamp(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %lo = attnjit.read 0[] extents [] strides [] : f32 -> f32
  %hi = attnjit.read 1[] extents [] strides [] : f32 -> f32
  %x = arith.maximumf %s, %lo {attnjit.clamp = 3} : f32
  %r = arith.minimumf %x, %hi {attnjit.clamp = 3} : f32
  return %r, %true : f32, i1
}

// CHECK-LABEL: func.func @absolute
// CHECK: %[[NONZERO:.*]] = arith.cmpf une, %arg0, %[[ZERO:.*]] : f32
// CHECK: %[[NEGATIVE:.*]] = arith.cmpf olt, %arg0, %[[ZERO]] : f32
// CHECK: %[[OTHER:.*]] = arith.negf %arg1
// CHECK: %[[SIGNED:.*]] = arith.select %[[NEGATIVE]], %[[OTHER]], %arg1
// CHECK: %[[D:.*]] = arith.select %[[NONZERO]], %[[SIGNED]], %[[ZERO]]
// CHECK: return %{{.*}}, %true, %[[D]]
func.func @absolute(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %r = math.absf %s : f32
  return %r, %true : f32, i1
}

// sign, the steps and what they are compared with: no derivative.
// CHECK-LABEL: func.func @flat
// CHECK: %[[ZERO:.*]] = arith.constant 0.0
// CHECK: return %{{.*}}, %true, %[[ZERO]] : f32, i1, f32
func.func @flat(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %zero = arith.constant 0.0 : f32
  %one = arith.constant 1.0 : f32
  %c = arith.cmpf ogt, %s, %zero : f32
  %sign = arith.select %c, %one, %s {attnjit.flat} : f32
  %floor = math.floor %s : f32
  %ceil = math.ceil %s : f32
  %round = math.roundeven %s : f32
  %int = attnjit.to_int %s
  %float = arith.sitofp %int : i64 to f32
  %x = arith.addf %sign, %floor : f32
  %y = arith.addf %ceil, %round : f32
  %z = arith.addf %x, %y : f32
  %r = arith.addf %z, %float : f32
  return %r, %true : f32, i1
}

// sigmoid(x) * sigmoid(-x), each from an exponential of its own.
// CHECK-LABEL: func.func @sigmoid
// CHECK: %[[S:.*]] = arith.divf
// CHECK: %[[E:.*]] = math.exp %arg0
// CHECK: %[[SUM:.*]] = arith.addf %[[E]], %[[ONE:.*]] : f32
// CHECK: %[[OTHER:.*]] = arith.divf %[[ONE]], %[[SUM]]
// CHECK: %[[SLOPE:.*]] = arith.mulf %[[S]], %[[OTHER]]
// CHECK: arith.mulf %arg1, %[[SLOPE]]
// CHECK: return
func.func @sigmoid(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %one = arith.constant 1.0 : f32
  %n = arith.negf %s : f32
  %e = math.exp %n : f32
  %d = arith.addf %e, %one : f32
  %r = arith.divf %one, %d : f32
  return %r, %true : f32, i1
}

// One read that moves whole rows and is a factor besides: a sink for each.
// CHECK-LABEL: func.func @both_ways
// CHECK: %[[G:.*]] = attnjit.read 0[%[[Q:.*]]] extents
// CHECK: %[[P:.*]] = arith.mulf %arg1, %arg0
// CHECK: %[[SHIFT:.*]] = attnjit.sink %arg1 into 0[%[[Q]]] extents [16] row_shift
// CHECK: %[[V:.*]] = arith.select %{{.*}}, %[[P]], %{{.*}} : f32
// CHECK: %[[SINK:.*]] = attnjit.sink %[[V]] into 0[%[[Q]]] extents [16]{{$}}
// CHECK: return %{{.*}}, %true, %{{.*}}, %[[SHIFT]], %[[SINK]]
func.func @both_ways(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %q = attnjit.index q_idx
  %g = attnjit.read 0[%q] extents [16] strides [1] : f32 -> f32
  %x = arith.mulf %s, %g : f32
  %r = arith.addf %x, %g : f32
  return %r, %true : f32, i1
}

// A row shift through factors and conditions of the row; one of the key ends it.
// CHECK-LABEL: func.func @row_shifts
// CHECK: attnjit.sink %{{.*}} into 0[%{{.*}}] extents [16] row_shift
// CHECK: attnjit.sink %{{.*}} into 1[%{{.*}}] extents [16]{{$}}
// CHECK: return
func.func @row_shifts(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %zero = arith.constant 0.0 : f32
  %two = arith.constant 2 : i64
  %q = attnjit.index q_idx
  %k = attnjit.index kv_idx
  %a = attnjit.read 0[%q] extents [16] strides [1] : f32 -> f32
  %b = attnjit.read 1[%q] extents [16] strides [1] : f32 -> f32
  %c = arith.cmpi sgt, %q, %two : i64
  %d = arith.cmpi sgt, %k, %two : i64
  %f = attnjit.read 2[%q] extents [16] strides [1] : f32 -> f32
  %x = arith.mulf %a, %f : f32
  %y = arith.select %c, %x, %zero : f32
  %z = arith.select %d, %b, %zero : f32
  %u = arith.addf %s, %y : f32
  %r = arith.addf %u, %z : f32
  return %r, %true : f32, i1
}

// The rest, each against an exponential, a power or a function of the same argument.
// CHECK-LABEL: func.func @functions
// CHECK-DAG: %[[EXP:.*]] = math.exp %arg0
// CHECK-DAG: %[[SQRT:.*]] = math.sqrt %arg0
// CHECK-DAG: %[[RSQRT:.*]] = math.rsqrt %arg0
// CHECK-DAG: %[[SIN:.*]] = math.sin %arg0
// CHECK-DAG: %[[COS:.*]] = math.cos %arg0
// CHECK-DAG: arith.mulf %arg1, %[[EXP]]
// CHECK-DAG: arith.divf %arg1, %[[SQRT]]
// CHECK-DAG: arith.mulf %arg1, %[[RSQRT]]
// CHECK-DAG: arith.divf %arg1, %arg0
// CHECK: return
func.func @functions(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %exp = math.exp %s : f32
  %log = math.log %s : f32
  %sqrt = math.sqrt %s : f32
  %rsqrt = math.rsqrt %s : f32
  %sin = math.sin %s : f32
  %cos = math.cos %s : f32
  %a = arith.addf %exp, %log : f32
  %b = arith.addf %sqrt, %rsqrt : f32
  %c = arith.addf %sin, %cos : f32
  %d = arith.addf %a, %b : f32
  %r = arith.addf %c, %d : f32
  return %r, %true : f32, i1
}

// A power's exponent is lowered; its logarithm counts where the base is not 0.
// CHECK-LABEL: func.func @power
// CHECK: %[[G:.*]] = attnjit.read 0
// CHECK: %[[P:.*]] = math.powf %arg0, %[[G]]
// CHECK: %[[NONZERO:.*]] = arith.cmpf une, %[[G]]
// CHECK: %[[LESS:.*]] = arith.addf %[[G]], %{{.*}} : f32
// CHECK: math.powf %arg0, %[[LESS]]
// CHECK: math.log %arg0
// CHECK: return
func.func @power(%s: f32) -> (f32, i1) {
  %true = arith.constant true
  %g = attnjit.read 0[] extents [] strides [] : f32 -> f32
  %r = math.powf %s, %g : f32
  return %r, %true : f32, i1
}
