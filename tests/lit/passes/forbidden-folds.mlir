// RUN: attnjit-opt -canonicalize -attnjit-canonical-order -canonicalize -cse %s | FileCheck %s
// What upstream's folders and ours must leave alone: NaN and infinity count, floats are not reassociated.

// CHECK-LABEL: func.func @forbidden
// CHECK-DAG: arith.subf %arg0, %arg0
// CHECK-DAG: arith.mulf %arg0, %{{cst.*}}
// CHECK-DAG: arith.divf %arg0, %arg0
// CHECK-DAG: arith.cmpf oeq, %arg0, %arg0
// CHECK-DAG: arith.cmpf uno, %arg0, %arg0
// CHECK-DAG: %[[ONE:.*]] = arith.addf %arg0, %[[A:cst.*]] : f32
// CHECK-DAG: arith.addf %[[ONE]], %{{cst.*}} : f32
// CHECK-DAG: arith.divf %arg0, %{{cst.*}}
// CHECK: return
func.func @forbidden(%s: f32) -> (f32, f32, f32, i1, i1, f32, f32) {
  %zero = arith.constant 0.0 : f32
  %large = arith.constant 1.0e+30 : f32
  %mlarge = arith.constant -1.0e+30 : f32
  %three = arith.constant 3.0 : f32
  %a = arith.subf %s, %s : f32
  %b = arith.mulf %s, %zero : f32
  %c = arith.divf %s, %s : f32
  %d = arith.cmpf oeq, %s, %s : f32
  %e = arith.cmpf uno, %s, %s : f32
  %f0 = arith.addf %s, %large : f32
  %f = arith.addf %f0, %mlarge : f32
  %g = arith.divf %s, %three : f32
  return %a, %b, %c, %d, %e, %f, %g : f32, f32, f32, i1, i1, f32, f32
}
