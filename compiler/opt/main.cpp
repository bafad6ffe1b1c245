// attnjit-opt: runs any pass on a .mlir file, or prints the MLIR or the CUDA of an expression:
//   attnjit-opt --attnjit-canonical-order in.mlir
//   attnjit-opt --expr 'score + bias[h]' --shape 1,8,128,128 --capture bias=bfloat16,8 | attnjit-opt ...
//   attnjit-opt --expr 'score + bias[h]' --cuda bfloat16
//   attnjit-opt --expr 'score + bias[h]' --backward --gradients bias
#include <CLI/CLI.hpp>
#include <map>
#include <sstream>

#include "compiler/builder.h"
#include "compiler/cuda_mod.h"
#include "compiler/dialect/dialect.h"
#include "compiler/frontend.h"
#include "compiler/mlir_context.h"
#include "compiler/passes/passes.h"
#include "dsl/bind.h"
#include "dsl/parser.h"
#include "llvm/Support/raw_ostream.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Arith/Transforms/Passes.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/LLVMIR/LLVMDialect.h"
#include "mlir/Dialect/Math/IR/Math.h"
#include "mlir/Tools/mlir-opt/MlirOptMain.h"
#include "mlir/Transforms/Passes.h"

namespace {

using namespace attnjit;

// `name=dtype,extent,...`, contiguous along the last dimension. False where it is not that.
bool parse_capture(const std::string& description, std::map<std::string, compiler::CaptureInfo>& infos) {
  const std::size_t equals = description.find('=');
  if (equals == std::string::npos) return false;
  std::stringstream rest(description.substr(equals + 1));
  std::string part;
  compiler::CaptureInfo info;
  bool known = false;
  std::int64_t elements = 1;
  std::getline(rest, part, ',');
  for (int d = 0; d <= static_cast<int>(dsl::DType::kF32); ++d) {
    if (dsl::dtype_name(static_cast<dsl::DType>(d)) != part) continue;
    info.dtype = static_cast<dsl::DType>(d);
    known = true;
  }
  while (std::getline(rest, part, ',')) {
    const std::int64_t extent = std::strtoll(part.c_str(), nullptr, 10);
    if (extent < 1) return false;
    elements *= extent;
    info.extent.push_back(extent);
    info.stride_class.push_back(compiler::StrideClass::kAny);
  }
  if (!info.stride_class.empty()) info.stride_class.back() = compiler::StrideClass::kUnit;
  info.offsets_fit_32 = elements < std::int64_t{1} << 31;
  infos[description.substr(0, equals)] = info;
  return known;
}

// Parses and binds `text` into `out`, whose reads are then numbered by `infos`. Names without a description are f32.
bool bind_expression(const std::string& text, dsl::ModKind kind, std::map<std::string, compiler::CaptureInfo>& infos,
                     dsl::Expr& out) {
  dsl::Expected<dsl::Expr> expr = dsl::parse(text, kind);
  if (expr) {
    std::vector<dsl::CaptureBinding> bindings;
    for (const dsl::Capture& capture : expr->captures) {
      const auto rank = static_cast<std::size_t>(capture.rank);
      compiler::CaptureInfo plain{.dtype = dsl::DType::kF32,
                                  .extent = std::vector<std::int64_t>(rank, 64),
                                  .stride_class = std::vector<compiler::StrideClass>(rank, compiler::StrideClass::kAny),
                                  .offsets_fit_32 = true};
      const compiler::CaptureInfo& info = infos.try_emplace(capture.name, plain).first->second;
      bindings.push_back({info.dtype, static_cast<int>(info.extent.size())});
    }
    expr = dsl::bind(*expr, bindings, kind);
  }
  if (!expr) {
    llvm::errs() << dsl::format_error(expr.error(), text) << "\n";
    return false;
  }
  out = *expr;
  return true;
}

int print_cuda(const compiler::ModProblem& problem, const std::string& dtype, bool backward, compiler::ModForm form) {
  compiler::PhaseTimes phases;
  compiler::Frontend frontend(phases);
  if (!(backward ? frontend.run_backward(problem, {}, compiler::Target::kCuda)
                 : frontend.run(problem, {}, compiler::Target::kCuda))) {
    llvm::errs() << frontend.error() << "\n";
    return 1;
  }
  const compiler::CudaAccuracy accuracy = dtype == "float32"   ? compiler::CudaAccuracy::kFull
                                          : dtype == "float16" ? compiler::CudaAccuracy::kFloat16
                                                               : compiler::CudaAccuracy::kBFloat16;
  const compiler::CudaMod mod = compiler::emit_cuda_mod(frontend.function(), problem, accuracy, frontend.facts().sinks,
                                                        frontend.tile_facts(), form);
  llvm::outs() << mod.text;
  llvm::errs() << mod.error;
  return mod.error.empty() ? 0 : 1;
}

// The function with the gradients in it, after the passes.
int print_backward(const compiler::ModProblem& problem) {
  compiler::PhaseTimes phases;
  compiler::Frontend frontend(phases);
  if (!frontend.run_backward(problem, {}, compiler::Target::kCpu)) {
    llvm::errs() << frontend.error() << "\n";
    return 1;
  }
  frontend.function()->print(llvm::outs());
  llvm::outs() << "\n";
  return 0;
}

int print_expression(int argc, char** argv) {
  std::string text, mask, cuda;
  std::vector<std::int64_t> shape{1, 8, 1024, 1024};
  std::vector<std::string> captures, gradients;
  bool backward = false, folded = false, partial_keys = false, summaries = false;
  CLI::App app("Prints the MLIR that the compiler builds from an expression");
  app.add_option("--expr", text, "score_mod")->required();
  app.add_option("--mask", mask, "mask_mod");
  app.add_option("--shape", shape, "batch,heads,seqlen_q,seqlen_kv")->delimiter(',')->expected(4);
  app.add_option("--capture", captures, "name=dtype,extent,...");
  app.add_option("--cuda", cuda, "print the CUDA instead, for inputs of this type")
      ->check(CLI::IsMember({"float32", "float16", "bfloat16"}));
  app.add_flag("--folded", folded, "print the folded form, with --cuda");
  app.add_flag("--backward", backward, "print the function with the gradients in it, after the passes");
  app.add_option("--gradients", gradients, "captured tensors whose gradient is wanted: name,...")->delimiter(',');
  app.add_flag("--partial-keys", partial_keys, "with --backward: the LSE is of more keys than these");
  app.add_flag("--summaries", summaries, "what is known of tiles may read summaries of captured tensors");
  CLI11_PARSE(app, argc, argv);

  std::map<std::string, compiler::CaptureInfo> infos;
  for (const std::string& capture : captures) {
    if (parse_capture(capture, infos)) continue;
    llvm::errs() << "--capture " << capture << ": expected name=dtype,extent,...\n";
    return 1;
  }
  compiler::ModProblem problem;
  problem.summaries = summaries;
  problem.batch = shape[0];
  problem.num_heads = shape[1];
  problem.seqlen_q = shape[2];
  problem.seqlen_kv = shape[3];
  problem.partial_keys = partial_keys;
  if (!bind_expression(text, dsl::ModKind::kScoreMod, infos, problem.score_mod)) return 1;
  if (!mask.empty() && !bind_expression(mask, dsl::ModKind::kMaskMod, infos, problem.mask_mod.emplace())) return 1;
  // One table for both expressions, by name.
  for (dsl::Expr* expr : {&problem.score_mod, mask.empty() ? nullptr : &*problem.mask_mod}) {
    if (!expr) continue;
    for (dsl::Node& node : expr->nodes) {
      if (node.op != dsl::Op::kRead) continue;
      const auto found = infos.find(expr->captures[static_cast<std::size_t>(node.capture)].name);
      node.capture = static_cast<std::int32_t>(std::distance(infos.begin(), found));
    }
  }
  problem.score_mod.captures.clear();
  for (const auto& [name, info] : infos) {
    problem.captures.push_back(info);
    problem.score_mod.captures.push_back({.name = name, .rank = static_cast<int>(info.extent.size())});
  }
  for (const std::string& name : gradients) {
    const auto found = infos.find(name);
    if (found == infos.end()) {
      llvm::errs() << "--gradients " << name << ": no such captured tensor\n";
      return 1;
    }
    problem.gradients |= 1u << std::distance(infos.begin(), found);
  }
  if (!cuda.empty())
    return print_cuda(problem, cuda, backward, folded ? compiler::ModForm::kFolded : compiler::ModForm::kPlain);
  if (backward) return print_backward(problem);
  compiler::MlirSession session;
  compiler::build_module(session.context(), problem)->print(llvm::outs());
  llvm::outs() << "\n";
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string_view(argv[1]).starts_with("--expr")) return print_expression(argc, argv);
  mlir::DialectRegistry registry;
  registry.insert<compiler::AttnjitDialect, mlir::arith::ArithDialect, mlir::func::FuncDialect, mlir::math::MathDialect,
                  mlir::LLVM::LLVMDialect>();
  compiler::registerAttnjitPasses();
  mlir::registerCanonicalizerPass();
  mlir::registerCSEPass();
  mlir::arith::registerArithIntRangeOptsPass();
  mlir::PassPipelineRegistration<>("attnjit-canonical", "To the canonical form", compiler::build_canonical_pipeline);
  mlir::PassPipelineRegistration<>("attnjit-facts", "From the canonical form to facts", compiler::build_fact_pipeline);
  mlir::PassPipelineRegistration<>("attnjit-cuda-facts", "The same for CUDA", compiler::build_cuda_fact_pipeline);
  return mlir::asMainReturnCode(mlir::MlirOptMain(argc, argv, "attnjit pass driver\n", registry));
}
