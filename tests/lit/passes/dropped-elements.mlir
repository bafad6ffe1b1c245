// RUN: attnjit-opt -attnjit-dropped-elements -canonicalize %s | FileCheck %s
// keep of the whole expression, and the value where it holds.

// CHECK-LABEL: func.func @choice(%arg0: f32) -> (f32, i1)
// CHECK: %[[C:.*]] = arith.cmpi sge
// CHECK: return %arg0, %[[C]] : f32, i1
func.func @choice(%s: f32) -> f32 {
  %ninf = arith.constant 0xFF800000 : f32
  %q = attnjit.index q_idx
  %k = attnjit.index kv_idx
  %c = arith.cmpi sge, %q, %k : i64
  %r = arith.select %c, %s, %ninf : f32
  return %r : f32
}

// The other branch: kept where the condition does not hold.
// CHECK-LABEL: func.func @other_choice
// CHECK: %[[C:.*]] = arith.cmpi slt
// CHECK: return %arg0, %[[C]] : f32, i1
func.func @other_choice(%s: f32) -> f32 {
  %ninf = arith.constant 0xFF800000 : f32
  %q = attnjit.index q_idx
  %k = attnjit.index kv_idx
  %c = arith.cmpi sge, %q, %k : i64
  %r = arith.select %c, %ninf, %s : f32
  return %r : f32
}

// A sum keeps what both operands keep, a difference what its first one keeps.
// CHECK-LABEL: func.func @sum
// CHECK: %[[A:.*]] = arith.cmpf ogt, %arg0
// CHECK: %[[B:.*]] = arith.cmpf olt, %arg0
// CHECK: %[[KEEP:.*]] = arith.andi %[[A]], %[[B]] : i1
// CHECK: %[[SUM:.*]] = arith.addf %arg0, %{{.*}} : f32
// CHECK: return %[[SUM]], %[[KEEP]]
func.func @sum(%s: f32) -> f32 {
  %ninf = arith.constant 0xFF800000 : f32
  %one = arith.constant 1.0 : f32
  %two = arith.constant 2.0 : f32
  %a = arith.cmpf ogt, %s, %one : f32
  %b = arith.cmpf olt, %s, %two : f32
  %x = arith.select %a, %s, %ninf : f32
  %y = arith.select %b, %one, %ninf : f32
  %r = arith.addf %x, %y : f32
  return %r : f32
}

// CHECK-LABEL: func.func @difference
// CHECK: %[[A:.*]] = arith.cmpf ogt, %arg0
// CHECK: %[[V:.*]] = arith.select %{{.*}}, %{{.*}}, %{{.*}} : f32
// CHECK: %[[D:.*]] = arith.subf %arg0, %[[V]] : f32
// CHECK: return %[[D]], %[[A]]
func.func @difference(%s: f32) -> f32 {
  %ninf = arith.constant 0xFF800000 : f32
  %one = arith.constant 1.0 : f32
  %two = arith.constant 2.0 : f32
  %a = arith.cmpf ogt, %s, %one : f32
  %b = arith.cmpf olt, %s, %two : f32
  %x = arith.select %a, %s, %ninf : f32
  %y = arith.select %b, %one, %ninf : f32
  %r = arith.subf %x, %y : f32
  return %r : f32
}

// A positive literal factor keeps, a negative one or an unknown one drops nothing.
// CHECK-LABEL: func.func @products
// CHECK: %[[TRUE:.*]] = arith.constant true
// CHECK: return %{{.*}}, %[[TRUE]]
func.func @products(%s: f32) -> f32 {
  %ninf = arith.constant 0xFF800000 : f32
  %m2 = arith.constant -2.0 : f32
  %one = arith.constant 1.0 : f32
  %a = arith.cmpf ogt, %s, %one : f32
  %x = arith.select %a, %s, %ninf : f32
  %r = arith.mulf %x, %m2 : f32
  return %r : f32
}

// CHECK-LABEL: func.func @positive_product
// CHECK: %[[A:.*]] = arith.cmpf ogt
// CHECK: %[[P:.*]] = arith.mulf %arg0, %{{.*}} : f32
// CHECK: return %[[P]], %[[A]]
func.func @positive_product(%s: f32) -> f32 {
  %ninf = arith.constant 0xFF800000 : f32
  %two = arith.constant 2.0 : f32
  %one = arith.constant 1.0 : f32
  %a = arith.cmpf ogt, %s, %one : f32
  %x = arith.select %a, %s, %ninf : f32
  %r = arith.mulf %x, %two : f32
  return %r : f32
}

// Both branches may be kept: the condition chooses between their conditions.
// CHECK-LABEL: func.func @nested
// CHECK: %[[C:.*]] = arith.cmpf ogt
// CHECK: %[[D:.*]] = arith.cmpf olt
// CHECK: %[[KEEP:.*]] = arith.select %[[C]], %[[D]], %true : i1
// CHECK: return %{{.*}}, %[[KEEP]]
func.func @nested(%s: f32) -> f32 {
  %ninf = arith.constant 0xFF800000 : f32
  %one = arith.constant 1.0 : f32
  %two = arith.constant 2.0 : f32
  %c = arith.cmpf ogt, %s, %one : f32
  %d = arith.cmpf olt, %s, %two : f32
  %x = arith.select %d, %s, %ninf : f32
  %r = arith.select %c, %x, %two : f32
  return %r : f32
}

// Nothing is dropped through a function, nor through an operation that one is made of.
// CHECK-LABEL: func.func @through
// CHECK: %[[TRUE:.*]] = arith.constant true
// CHECK: return %{{.*}}, %[[TRUE]]
func.func @through(%s: f32) -> f32 {
  %ninf = arith.constant 0xFF800000 : f32
  %one = arith.constant 1.0 : f32
  %c = arith.cmpf ogt, %s, %one : f32
  %x = arith.select %c, %s, %ninf : f32
  %t = math.tanh %x : f32
  %m = arith.minimumf %x, %one {attnjit.opaque} : f32
  %r = arith.addf %t, %m : f32
  return %r : f32
}

// CHECK-LABEL: func.func @all
// CHECK: %[[FALSE:.*]] = arith.constant false
// CHECK: return %{{.*}}, %[[FALSE]]
func.func @all(%s: f32) -> f32 {
  %ninf = arith.constant 0xFF800000 : f32
  %r = arith.addf %s, %ninf : f32
  return %r : f32
}
