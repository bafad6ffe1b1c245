// Compiles a problem, or its kernels for another machine, and writes down what came out.
#include "runtime/explain.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <memory>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "compiler/compiler.h"
#include "dsl/printer.h"
#include "runtime/backends.h"
#include "runtime/cuda_math_backend.h"
#include "runtime/cuda_math_backward.h"
#include "runtime/fused.h"
#include "runtime/plan.h"
#include "runtime/sm80_backend.h"
#include "runtime/sm80_backward.h"
#include "runtime/sm90_backend.h"

namespace attnjit::runtime {
namespace {

// "sm_90a".
Result<compiler::CudaArch> parse_arch(std::string_view text) {
  compiler::CudaArch arch;
  const Failure refused{ATTNJIT_INVALID_ARGUMENT,
                        fmt::format("options.arch is '{}'; allowed: sm_80, sm_86, sm_89, sm_90, sm_90a, ...", text)};
  if (!text.starts_with("sm_")) return refused;
  const char* const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data() + 3, last, arch.number);
  arch.specific = end + 1 == last && *end == 'a';
  if (error != std::errc() || (end != last && !arch.specific) || arch.number < 10 || arch.number > 999) return refused;
  return arch;
}

// What a compile is explained by.
struct Findings {
  compiler::ModFacts facts;
  compiler::PhaseTimes phases;
  // What a mask's tiles are counted by: of the kernel that the call would take, the CPU's panels by its blocks of keys;
  // 0 where that has no tiles.
  int tile_m = cpu::kPanelLanes, tile_n = cpu::kTileRows;
  // Of CUDA.
  Json kernels;
  Json unsupported = Json::array();  // backends that do not serve the call, each with its reason
  Json dumps = Json::object();
};

Check compile_for_cpu(const Request& request, const CollectText& collect, Findings* findings) {
  const auto take = [&](const auto& tile) -> Check {
    if (!tile) return tile.failure();
    findings->facts = (*tile)->facts();
    findings->phases = (*tile)->phases();
    return {};
  };
  if (request.call.signature.backward) return take(compile_gradient_tile(request, collect));
  return take(compile_tile(request, collect));
}

// The kernels of every backend of `backends`, for `device` where there is one.
Check compile_for_cuda(const Request& request, const std::vector<attnjit_backend>& backends, compiler::CudaArch arch,
                       const std::shared_ptr<CudaDevice>& device, const CollectText& collect, Findings* findings) {
  const FusedTarget target = make_target(arch, device, false);
  findings->kernels = Json::array();
  findings->tile_m = 0;
  const auto found = [&](attnjit_backend backend, const Json& kernels, const auto& binary) {
    // At the top stands what the best backend says; each kernel has its own times.
    if (findings->kernels.empty()) {
      findings->facts = binary.facts;
      findings->phases = binary.phases;
    }
    for (const Json& kernel : kernels) {
      Json row = {{"backend", attnjit_backend_name(backend)}};
      row.update(kernel);
      findings->kernels.push_back(std::move(row));
    }
  };
  for (const attnjit_backend backend : backends) {
    Check failure;
    const auto take = [&](const auto& built, auto&& rows) {
      if (built) {
        found(backend, rows(*built), *built);
      } else {
        failure = built.failure();
      }
    };
    const auto cut_by = [findings](int tile_m, int tile_n) {
      if (!findings->kernels.empty()) return;
      findings->tile_m = tile_m;
      findings->tile_n = tile_n;
    };
    const auto kernel_of = [cut_by](const FusedBinary& binary) {
      cut_by(binary.kernel.tile_m, binary.kernel.tile_n);
      return kernels_json(binary);
    };
    const bool backward = request.call.signature.backward != 0;
    if (backend == ATTNJIT_BACKEND_SM90 && backward) {
      failure = refuse_sm90_backward();
    } else if (backend == ATTNJIT_BACKEND_SM90) {
      take(build_sm90(request, target, collect), kernel_of);
    } else if (backend == ATTNJIT_BACKEND_SM80 && backward) {
      take(build_sm80_backward(request, target, collect), [cut_by](const Sm80BackwardBinary& binary) {
        cut_by(binary.config.tile_m, binary.config.tile_n);
        return kernels_json(binary);
      });
    } else if (backend == ATTNJIT_BACKEND_SM80) {
      take(build_sm80(request, target, collect), kernel_of);
    } else if (backward) {
      take(build_cuda_math_backward(request, arch, collect),
           [](const CudaMathBackwardBinaries& binaries) { return kernels_json(binaries); });
    } else {
      take(build_cuda_math(request, arch, collect),
           [&](const CudaMathBinaries& binaries) { return kernels_json(binaries, request.call.signature.seqlen_kv); });
    }
    if (failure && failure->status != ATTNJIT_UNSUPPORTED) return failure;
    if (failure) {
      findings->unsupported.push_back({{"backend", attnjit_backend_name(backend)}, {"reason", failure->message}});
    }
  }
  if (!findings->kernels.empty()) return {};
  std::string reasons;
  for (const Json& row : findings->unsupported) {
    reasons += fmt::format("; {}: {}", row["backend"].get<std::string>(), row["reason"].get<std::string>());
  }
  return Failure{ATTNJIT_UNSUPPORTED,
                 fmt::format("no permitted backend serves {} on {}{}", shape_text(request.call.signature),
                             compiler::cuda_arch_name(arch), reasons)};
}

// How many tiles of a kernel the mask drops, keeps and divides, over all heads; null where that is not known, or not
// without captured values. A backward asks for the queries of each tile of keys.
Json tiles_json(const Request& request, int tile_m, int tile_n) {
  const Signature& s = request.call.signature;
  const std::optional<KnownTiles> known = KnownTiles::find(request, tile_m, tile_n);
  constexpr std::int64_t kMost = 1 << 24;  // else explaining takes seconds
  if (!known || known->m_tiles() * known->n_tiles() > kMost / std::max<std::int64_t>(s.batch * s.num_heads, 1)) {
    return nullptr;
  }
  KnownTiles::Counts sum;
  for (std::int64_t head = 0; head < s.batch * s.num_heads; ++head) {
    const std::int64_t b = head / s.num_heads, h = head % s.num_heads;
    for (std::int64_t i = 0; i < (s.backward ? known->n_tiles() : known->m_tiles()); ++i) {
      const KnownTiles::Counts counts = s.backward ? known->count_queries(b, h, i) : known->count(b, h, i);
      sum.full += counts.full;
      sum.partial += counts.partial;
    }
  }
  const std::int64_t all = s.batch * s.num_heads * known->m_tiles() * known->n_tiles();
  return {{"queries", tile_m},
          {"keys", tile_n},
          {"skipped", all - sum.full - sum.partial},
          {"full", sum.full},
          {"partial", sum.partial}};
}

Json captures_json(const CheckedCall& call) {
  Json captures = Json::array();
  for (std::size_t i = 0; i < call.forward.num_captures; ++i) {
    const dsl::CaptureView& capture = call.captures[i];
    captures.push_back({{"name", call.capture_names[i]},
                        {"dtype", dsl::dtype_name(capture.dtype)},
                        {"type", dsl::type_name(dsl::value_type(capture.dtype))},
                        {"shape", Json(std::vector<std::int64_t>(capture.extent, capture.extent + capture.rank))}});
  }
  return captures;
}

Json expression_json(const dsl::Expr& parsed, const dsl::Expr& bound) {
  return {{"canonical", dsl::print(parsed)},
          {"typed", dsl::print(bound)},
          {"type", dsl::type_name(bound[bound.root].type)}};
}

}  // namespace

Result<std::string> explain(Context& context, const attnjit_attention* attention,
                            const attnjit_explain_options* options) {
  std::optional<compiler::CudaArch> arch;
  bool dump = false;
  if (options) {
    if (Check failure = check_struct("options", "ATTNJIT_EXPLAIN_OPTIONS_INIT", options, options->struct_size,
                                     sizeof(attnjit_explain_options))) {
      return *failure;
    }
    dump = options->dump != 0;
    if (options->arch) {
      Result<compiler::CudaArch> parsed = parse_arch(options->arch);
      if (!parsed) return parsed.failure();
      arch = *parsed;
    }
  }
  CheckedCall call;
  const attnjit_gradients* const gradients = options ? options->gradients : nullptr;
  const Purpose purpose = arch ? Purpose::kExplainCuda : Purpose::kExplain;
  if (Check failure = gradients ? check_backward_call(attention, gradients, purpose, &call)
                                : check_call(attention, purpose, &call)) {
    return *failure;
  }
  const RegistrySnapshot snapshot = context.registry();
  Result<Mods> parsed = parse_mods(attention->score_mod, attention->mask_mod, *snapshot.registry);
  if (!parsed) return parsed.failure();
  Result<Mods> bound = bind_mods(*parsed, attention->score_mod, attention->mask_mod, *snapshot.registry, call);
  if (!bound) return bound.failure();
  Result<std::vector<attnjit_backend>> backends = permitted_backends(context, call.signature);
  if (!backends) return backends.failure();

  const std::string key = make_key(call, *attention, snapshot.generation);
  const DumpFiles files(context, key, dump_header(context, call, *attention));
  const Request request{.context = context, .call = call, .mods = *bound, .files = files};
  Findings findings;
  CollectText collect;
  if (dump) {
    collect = [&](std::string_view kind, std::string_view text) {
      if (kind == "cubin") return;
      // The expression is the same for every backend; the code is not.
      Json& dumped = findings.dumps[std::string(kind)];
      dumped =
          kind == "mlir" || dumped.is_null() ? std::string(text) : dumped.get<std::string>() + '\n' + std::string(text);
    };
  }
  Check failure;
  if (arch) {
    failure = compile_for_cuda(request, *backends, *arch, nullptr, collect, &findings);
  } else if (call.signature.device == kCpu) {
    failure = compile_for_cpu(request, collect, &findings);
  } else {
    Result<std::shared_ptr<CudaDevice>> device = context.cuda_device(call.signature.device);
    if (!device) return device.failure();
    arch = {.number = (*device)->arch(), .specific = false};
    failure = compile_for_cuda(request, *backends, *arch, *device, collect, &findings);
  }
  if (failure) return *failure;

  const std::optional<dsl::Expr>& mask = parsed->mask_mod;
  const std::optional<dsl::Expr>& bound_mask = bound->mask_mod;
  Json json = {{"score_mod", expression_json(parsed->score_mod, bound->score_mod)},
               {"mask_mod", mask && bound_mask ? expression_json(*mask, *bound_mask) : Json()},
               {"captures", captures_json(call)},
               {"problem", shape_text(call.signature)},
               {"backend", attnjit_backend_name(backends->front())}};
  if (gradients) json["gradients"] = gradients_json(call);
  if (arch) {
    json["arch"] = compiler::cuda_arch_name(*arch);
    json["backend"] = findings.kernels[0]["backend"];
    json["kernels"] = std::move(findings.kernels);
    if (!findings.unsupported.empty()) json["unsupported"] = std::move(findings.unsupported);
  } else {
    json["host"] = host_json(context);
  }
  json["hash"] = hash_text(findings.facts);
  if (findings.facts.knows_tiles && findings.tile_m > 0) {
    // What captured values decide is known when the kernel runs.
    const bool by_values = findings.facts.tiles_read_captured || !findings.facts.summaries.empty();
    json["tiles"] = by_values ? Json() : tiles_json(request, findings.tile_m, findings.tile_n);
  }
  json["facts"] = gradients ? gradient_facts_json(findings.facts, call) : facts_json(findings.facts);
  json["phases_ms"] = phases_json(findings.phases);
  json.update(findings.dumps);
  return json.dump(2);
}

}  // namespace attnjit::runtime
