my_mod(score, b, h, m, n) =
  let distance = m - n;
  let slope = exp2(-2.0 * (h + 1));
  score - slope * distance if 0 <= distance < 48 else -inf
