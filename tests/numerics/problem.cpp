// Values of a case's tensors, and its expressions.
#include "tests/numerics/problem.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <stdexcept>

#include "dsl/bind.h"
#include "dsl/interpreter.h"
#include "dsl/parser.h"

namespace attnjit::numerics {
namespace {

bool bind_one(const std::string& text, dsl::ModKind kind, const std::vector<NamedTensor>& captures, BoundMod* mod,
              std::string* error) {
  const auto parsed = dsl::parse(text, kind);
  if (!parsed) {
    *error = dsl::format_error(parsed.error(), text);
    return false;
  }
  std::vector<dsl::CaptureBinding> bindings;
  mod->captures.clear();
  for (const dsl::Capture& capture : parsed->captures) {
    const auto found = std::find_if(captures.begin(), captures.end(),
                                    [&](const NamedTensor& tensor) { return tensor.name == capture.name; });
    if (found == captures.end()) {
      *error = "the case has no capture named '" + capture.name + "'";
      return false;
    }
    bindings.push_back({found->tensor.dtype(), static_cast<int>(found->tensor.shape().size())});
    mod->captures.push_back(found->tensor);
  }
  auto bound = dsl::bind(*parsed, bindings, kind);
  if (!bound) {
    *error = dsl::format_error(bound.error(), text);
    return false;
  }
  mod->expr = std::move(*bound);
  return true;
}

// Calls `body` with every index but those that dimensions of stride 0 repeat.
template <typename Body>
void for_each_distinct(const Tensor& tensor, Body&& body) {
  std::vector<std::int64_t> shape = tensor.shape();
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (tensor.stride()[i] == 0) shape[i] = std::min<std::int64_t>(shape[i], 1);
  }
  for_each_index(shape, body);
}

void fill_normal(Tensor* tensor, Random* random, double factor, bool positive) {
  for_each_distinct(*tensor, [&](auto index) {
    const double value = factor * random->normal();
    tensor->set(index, positive ? std::fabs(value) : value);
  });
}

void multiply(Tensor* tensor, std::span<const std::int64_t> index, double factor) {
  tensor->set(index, tensor->at(index) * factor);
}

// k_j of `size` keys times a ramp up to `most`, forwards or backwards.
void ramp_keys(Tensor* k, double most, bool falling) {
  const auto size = static_cast<double>(k->shape()[2]);
  for_each_distinct(*k, [&](auto index) {
    const auto j = static_cast<double>(index[2]);
    multiply(k, index, most * (falling ? size - j : j + 1.0) / size);
  });
}

// The first feature of q is 8 for two rows of three and -8 for the third; that of k is 0 but for the outliers, and what
// makes their scores differ there.
void set_outliers(Problem* problem, Random* random) {
  const Case& spec = problem->spec;
  for_each_distinct(problem->q, [&](auto index) {
    if (index[3] == 0) problem->q.set(index, index[2] % 3 == 2 ? -8.0 : 8.0);
  });
  for_each_distinct(problem->k, [&](auto index) {
    if (index[3] == 0) problem->k.set(index, 0.0);
  });
  if (spec.seqlen_kv == 0 || spec.head_dim == 0) return;
  for (std::int64_t b = 0; b < spec.batch; ++b) {
    for (std::int64_t h = 0; h < spec.num_heads_kv; ++h) {
      const double above = (b + h) % 2 == 0 ? 200.0 : 5000.0;
      // Anywhere, late, and last.
      for (const std::int64_t from : {std::int64_t{0}, spec.seqlen_kv / 2, spec.seqlen_kv - 1}) {
        problem->k.set({b, h, random->between(from, spec.seqlen_kv - 1), 0}, above / (8.0 * problem->scale()));
      }
    }
  }
}

// The first feature of every 50th key of a head, which begin elsewhere in each, is infinite; no q there is zero.
void set_infinite_keys(Problem* problem) {
  for_each_distinct(problem->q, [&](auto index) {
    if (index[3] == 0 && problem->q.at(index) == 0.0) problem->q.set(index, 1.0);
  });
  for_each_distinct(problem->k, [&](auto index) {
    if (index[3] != 0 || (index[2] + 7 * index[1] + 3) % 50 != 0) return;
    problem->k.set(
        index, index[2] % 2 == 0 ? std::numeric_limits<double>::infinity() : -std::numeric_limits<double>::infinity());
  });
}

void set_huge_values(Tensor* v) {
  const double most = v->dtype() == dsl::DType::kF16 ? 3e4 : 1e30;
  for_each_distinct(*v, [&](auto index) { v->set(index, most * std::clamp(v->at(index) / 2.0, -1.0, 1.0)); });
}

void shape_inputs(Problem* problem, Random* random) {
  const Inputs inputs = problem->spec.inputs;
  if (inputs == Inputs::kRising || inputs == Inputs::kInfinite || inputs == Inputs::kHugeValues) {
    ramp_keys(&problem->k, 8.0, false);
  }
  if (inputs == Inputs::kFalling) ramp_keys(&problem->k, 8.0, true);
  if (inputs == Inputs::kSteep) ramp_keys(&problem->k, 100.0, false);
  if (inputs == Inputs::kSteepFalling) ramp_keys(&problem->k, 100.0, true);
  if (inputs == Inputs::kOutliers) set_outliers(problem, random);
  if (inputs == Inputs::kInfinite) set_infinite_keys(problem);
  if (inputs == Inputs::kHugeValues) set_huge_values(&problem->v);
}

// NaN and infinity in every key row that no query row keeps, whatever its score is.
void poison_dropped_keys(Problem* problem) {
  const Case& spec = problem->spec;
  dsl::Interpreter score_mod(problem->score_mod.expr, problem->score_mod.views());
  std::optional<dsl::Interpreter> mask_mod;
  if (problem->mask_mod) mask_mod.emplace(problem->mask_mod->expr, problem->mask_mod->views());
  const auto dropped = [&](dsl::Point point) {
    for (const double score : {0.0, std::numeric_limits<double>::quiet_NaN()}) {
      point.score = score;
      if (score_mod.score_mod(point).keep && !(mask_mod && !mask_mod->mask_mod(point))) return false;
    }
    return true;
  };
  const std::int64_t group = spec.num_heads / spec.num_heads_kv;
  for (std::int64_t b = 0; b < spec.batch; ++b) {
    for (std::int64_t head = 0; head < spec.num_heads_kv; ++head) {
      for (std::int64_t j = 0; j < spec.seqlen_kv; ++j) {
        bool all = true;
        for (std::int64_t h = head * group; all && h < (head + 1) * group; ++h) {
          for (std::int64_t i = 0; all && i < spec.seqlen_q; ++i) {
            all = dropped({.b = b, .h = h, .q_idx = i, .kv_idx = j});
          }
        }
        if (!all) continue;
        for (std::int64_t d = 0; d < spec.head_dim; ++d) {
          problem->k.set({b, head, j, d}, (j + d) % 2 == 0 ? std::numeric_limits<double>::quiet_NaN()
                                                           : std::numeric_limits<double>::infinity());
        }
      }
    }
  }
}

}  // namespace

std::vector<dsl::CaptureView> BoundMod::views() const {
  std::vector<dsl::CaptureView> result;
  result.reserve(captures.size());
  for (const Tensor& tensor : captures) result.push_back(tensor.capture_view());
  return result;
}

const NamedTensor& Problem::capture(std::string_view name) const {
  const auto found =
      std::find_if(captures.begin(), captures.end(), [&](const NamedTensor& tensor) { return tensor.name == name; });
  if (found == captures.end()) throw std::logic_error("no capture named " + std::string(name));
  return *found;
}

void fill_capture(Tensor* tensor, Fill fill, Random* random) {
  const bool is_float = dsl::value_type(tensor->dtype()) == dsl::Type::kFloat;
  const bool is_bool = tensor->dtype() == dsl::DType::kBool;
  std::int64_t document = 0;
  for_each_distinct(*tensor, [&](auto index) {
    if ((fill == Fill::kDocuments || fill == Fill::kBlocks) && !index.empty()) {
      const std::int64_t at = index.back(), length = tensor->shape().back();
      if (fill == Fill::kBlocks) {
        document = at / 64;
      } else {
        document = at == 0 ? 0 : document + (random->between(0, std::max<std::int64_t>(length / 3, 1)) == 0 ? 1 : 0);
      }
      if (is_float) {
        tensor->set(index, static_cast<double>(document));
      } else {
        tensor->set_int(index, document);
      }
      return;
    }
    if (is_bool) return tensor->set_int(index, random->between(0, 1));
    const bool poisoned = fill == Fill::kPoison && random->between(0, 3) == 0;
    if (is_float) {
      double value = fill == Fill::kIndex ? static_cast<double>(random->between(-2, 200)) : random->normal();
      if (poisoned) {
        const double poisons[] = {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                                  -std::numeric_limits<double>::infinity(), 0.0};
        value = random->pick(poisons);
      }
      return tensor->set(index, value);
    }
    const bool is_unsigned = tensor->dtype() == dsl::DType::kUInt8;
    std::int64_t value = fill == Fill::kIndex ? random->between(-2, 200) : random->between(-4, 4);
    const std::int64_t width = 8 * dsl::dtype_size(tensor->dtype());
    const std::int64_t highest =
        is_unsigned ? 255 : static_cast<std::int64_t>(~std::uint64_t{0} >> (65 - static_cast<std::uint64_t>(width)));
    const std::int64_t lowest = is_unsigned ? 0 : -highest - 1;
    if (poisoned) value = random->between(0, 1) == 0 ? lowest : highest;
    tensor->set_int(index, std::clamp(value, lowest, highest));
  });
}

bool bind_mods(Problem* problem, std::string* error) {
  if (!bind_one(problem->spec.score_mod, dsl::ModKind::kScoreMod, problem->captures, &problem->score_mod, error)) {
    return false;
  }
  problem->mask_mod.reset();
  if (problem->spec.mask_mod.empty()) return true;
  return bind_one(problem->spec.mask_mod, dsl::ModKind::kMaskMod, problem->captures, &problem->mask_mod.emplace(),
                  error);
}

bool make_problem(const Case& spec, Problem* problem, std::string* error) {
  if (spec.num_heads_kv < 0 || (spec.num_heads_kv == 0) != (spec.num_heads == 0) ||
      (spec.num_heads_kv > 0 && spec.num_heads % spec.num_heads_kv != 0)) {
    *error = "hq must be a multiple of hkv";
    return false;
  }
  if (dsl::value_type(spec.dtype) != dsl::Type::kFloat) {
    *error = "dtype must be float32, float16 or bfloat16";
    return false;
  }
  problem->spec = spec;
  Random random(spec.seed);
  // The first element's distance from 64-byte alignment is part of the problem, too.
  const std::int64_t shift = spec.layout_q == Layout::kPadded ? 1 : 0;
  problem->q = Tensor(spec.dtype, {spec.batch, spec.num_heads, spec.seqlen_q, spec.head_dim}, spec.layout_q, shift);
  problem->k = Tensor(spec.dtype, {spec.batch, spec.num_heads_kv, spec.seqlen_kv, spec.head_dim}, spec.layout_k, shift);
  problem->v = Tensor(spec.dtype, {spec.batch, spec.num_heads_kv, spec.seqlen_kv, spec.head_dim_v}, spec.layout_v, 0);
  const bool positive =
      spec.inputs == Inputs::kPositive || spec.inputs == Inputs::kSteep || spec.inputs == Inputs::kSteepFalling;
  const double factor_q = spec.inputs == Inputs::kLarge ? 8.0 : spec.inputs == Inputs::kZero ? 0.0 : 1.0;
  fill_normal(&problem->q, &random, factor_q, positive);
  fill_normal(&problem->k, &random, 1.0, positive);
  fill_normal(&problem->v, &random, 1.0, positive);
  shape_inputs(problem, &random);
  problem->captures.clear();
  for (const CaptureSpec& capture : spec.captures) {
    Tensor tensor(capture.dtype, capture.extent, capture.layout);
    fill_capture(&tensor, capture.fill, &random);
    problem->captures.push_back({capture.name, std::move(tensor)});
  }
  if (!bind_mods(problem, error)) return false;
  const BackwardSpec& backward = spec.backward;
  for (const GradientSpec& wanted : backward.captures) {
    const auto named = [&](const CaptureSpec& capture) { return capture.name == wanted.name; };
    if (std::none_of(spec.captures.begin(), spec.captures.end(), named)) {
      *error = "grads: the case has no capture named '" + wanted.name + "'";
      return false;
    }
  }
  if (backward.wanted()) {
    problem->grad_out = Tensor(spec.dtype, {spec.batch, spec.num_heads, spec.seqlen_q, spec.head_dim_v},
                               backward.layout_grad_out, backward.layout_grad_out == Layout::kPadded ? 1 : 0);
    fill_normal(&problem->grad_out, &random, 1.0, positive);
    if (backward.grad_lse) {
      problem->grad_lse =
          Tensor(dsl::DType::kF32, {spec.batch, spec.num_heads, spec.seqlen_q}, backward.layout_grad_out);
      fill_normal(&problem->grad_lse, &random, 1.0, false);
    }
  }
  if (spec.inputs == Inputs::kPoisoned) poison_dropped_keys(problem);
  return true;
}

}  // namespace attnjit::numerics
