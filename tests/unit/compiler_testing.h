// A problem from text, compiled and run over points, and the interpreter on the same points.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "compiler/cpu_compile.h"
#include "dsl/bind.h"
#include "dsl/interpreter.h"
#include "dsl/parser.h"
#include "kernels_templates/cpu/embedded.h"

namespace attnjit::compiler::testing {

// A captured tensor with contiguous storage of its own.
struct Tensor {
  std::string name;
  dsl::DType dtype = dsl::DType::kF32;
  std::vector<std::int64_t> extent;
  std::vector<unsigned char> bytes;

  template <typename T>
  static Tensor of(std::string name, dsl::DType dtype, std::vector<std::int64_t> extent, const std::vector<T>& values) {
    Tensor tensor{std::move(name), dtype, std::move(extent), std::vector<unsigned char>(values.size() * sizeof(T))};
    std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
    return tensor;
  }
  std::int64_t stride(std::size_t dimension) const {
    std::int64_t result = 1;
    for (std::size_t i = dimension + 1; i < extent.size(); ++i) result *= extent[i];
    return result;
  }
};

// How many random mods a test takes.
inline int random_count(int usual) {
  const char* const wanted = std::getenv("ATTNJIT_TEST_RANDOM_MODS");
  return wanted ? static_cast<int>(std::strtol(wanted, nullptr, 10)) : usual;
}

struct Shape {
  std::int64_t batch = 2, num_heads = 4, seqlen_q = 64, seqlen_kv = 96;
};

// Parses, binds and keeps what a compile needs.
class Mod {
 public:
  Mod(const std::string& text, std::vector<Tensor> tensors = {}, Shape shape = {}) : tensors_(std::move(tensors)) {
    const auto parsed = dsl::parse(text);
    if (!parsed) {
      ADD_FAILURE() << dsl::format_error(parsed.error(), text);
      return;
    }
    std::vector<dsl::CaptureBinding> bindings;
    for (const dsl::Capture& capture : parsed->captures) {
      const Tensor& tensor = find(capture.name);
      bindings.push_back({tensor.dtype, static_cast<int>(tensor.extent.size())});
      CaptureInfo info{.dtype = tensor.dtype, .extent = tensor.extent};
      cpu::CapturedView native{.data = tensor.bytes.data(), .stride = {}, .extent = {}};
      dsl::CaptureView view{
          .data = tensor.bytes.data(), .dtype = tensor.dtype, .rank = static_cast<int>(tensor.extent.size())};
      for (std::size_t i = 0; i < tensor.extent.size(); ++i) {
        info.stride_class.push_back(i + 1 == tensor.extent.size() ? StrideClass::kUnit : StrideClass::kAny);
        view.extent[i] = native.extent[i] = tensor.extent[i];
        view.stride[i] = native.stride[i] = tensor.stride(i);
      }
      problem.captures.push_back(info);
      views.push_back(view);
      table.push_back(native);
    }
    const auto bound = dsl::bind(*parsed, bindings, dsl::ModKind::kScoreMod);
    if (!bound) {
      ADD_FAILURE() << dsl::format_error(bound.error(), text);
      return;
    }
    problem.score_mod = *bound;
    problem.batch = shape.batch;
    problem.num_heads = shape.num_heads;
    problem.seqlen_q = shape.seqlen_q;
    problem.seqlen_kv = shape.seqlen_kv;
  }

  ModProblem problem;
  std::vector<dsl::CaptureView> views;
  std::vector<cpu::CapturedView> table;

 private:
  const Tensor& find(const std::string& name) {
    for (const Tensor& tensor : tensors_)
      if (tensor.name == name) return tensor;
    ADD_FAILURE() << "the test binds no '" << name << "'";
    return tensors_.emplace_back(Tensor{.name = name, .bytes = std::vector<unsigned char>(4)});
  }
  std::vector<Tensor> tensors_;
};

// A compiled mod over arrays of points, in the vectorised loop of elementwise.cpp.
class Elementwise {
 public:
  explicit Elementwise(const Mod& mod, CpuIsa isa = host_cpu_isa()) : mod_(mod) {
    const cpu::EmbeddedBitcode bitcode = cpu::elementwise_bitcode(static_cast<int>(isa));
    const CpuTemplate around{{reinterpret_cast<const char*>(bitcode.data), bitcode.size}, "attnjit_elementwise"};
    auto result = compile_mod(mod.problem, {.isa = isa}, around);
    if (result.error) ADD_FAILURE() << result.error->message;
    compiled = std::move(result.value);
  }

  // The modified scores in log2 units, as the tile sees them; given plain scores.
  std::vector<float> log2_values(const std::vector<dsl::Point>& points) const {
    const std::size_t n = points.size();
    std::vector<float> scores(n), values(n);
    std::vector<long long> indices(4 * n);
    for (std::size_t i = 0; i < n; ++i) {
      const double score = static_cast<float>(points[i].score);
      scores[i] = static_cast<float>(score * compiled.score_factor);
      indices[i] = points[i].b;
      indices[n + i] = points[i].h;
      indices[2 * n + i] = points[i].q_idx;
      indices[3 * n + i] = points[i].kv_idx;
    }
    if (!compiled.code) return values;
    using Function = void (*)(const float*, const long long*, float*, long long, const cpu::CapturedView*);
    reinterpret_cast<Function>(compiled.code->entry())(scores.data(), indices.data(), values.data(),
                                                       static_cast<long long>(n), mod_.table.data());
    return values;
  }

  CompiledMod compiled;

 private:
  const Mod& mod_;
};

}  // namespace attnjit::compiler::testing
