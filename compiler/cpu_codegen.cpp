// Linking, optimising and code generation for the CPU.
#include "compiler/cpu_codegen.h"

#include <chrono>
#include <mutex>

#include "compiler/frontend.h"
#include "kernels_templates/cpu/embedded.h"
#include "llvm/Analysis/TargetLibraryInfo.h"
#include "llvm/Analysis/TargetTransformInfo.h"
#include "llvm/Bitcode/BitcodeReader.h"
#include "llvm/IR/DiagnosticInfo.h"
#include "llvm/IR/DiagnosticPrinter.h"
#include "llvm/IR/LegacyPassManager.h"
#include "llvm/Linker/Linker.h"
#include "llvm/MC/TargetRegistry.h"
#include "llvm/Passes/PassBuilder.h"
#include "llvm/Support/SmallVectorMemoryBuffer.h"
#include "llvm/Support/TargetSelect.h"
#include "llvm/Target/TargetMachine.h"
#include "llvm/TargetParser/Host.h"
#include "llvm/Transforms/IPO/AlwaysInliner.h"
#include "llvm/Transforms/IPO/GlobalDCE.h"
#include "llvm/Transforms/IPO/Internalize.h"
#include "llvm/Transforms/InstCombine/InstCombine.h"
#include "llvm/Transforms/Scalar/EarlyCSE.h"
#include "llvm/Transforms/Scalar/LICM.h"
#include "llvm/Transforms/Scalar/LoopPassManager.h"
#include "llvm/Transforms/Scalar/SROA.h"
#include "llvm/Transforms/Utils/Cloning.h"
#include "llvm/Transforms/Vectorize/LoopVectorize.h"

namespace attnjit::compiler {
namespace {

struct IsaTarget {
  llvm::StringRef name, cpu, features;
};

// Fixed sets and not "whatever the host has": the same code on every host of a class, and a restriction is one.
const IsaTarget& isa_target(CpuIsa isa) {
  static constexpr IsaTarget kTargets[] = {
      {"sse2", "x86-64", ""},
      {"avx2", "x86-64-v3", ""},
      {"avx512", "x86-64-v4", ""},
      {"avx512bf16", "x86-64-v4", "+avx512bf16"},
  };
  return kTargets[static_cast<int>(isa)];
}

const std::string& host_cpu_name() {
  static const std::string name = llvm::sys::getHostCPUName().str();
  return name;
}

// Errors of LLVM's own, collected instead of printed.
class Diagnostics : public llvm::DiagnosticHandler {
 public:
  explicit Diagnostics(std::shared_ptr<std::string> errors) : errors_(std::move(errors)) {}
  bool handleDiagnostics(const llvm::DiagnosticInfo& info) override {
    if (info.getSeverity() == llvm::DS_Error) {
      llvm::raw_string_ostream stream(*errors_);
      llvm::DiagnosticPrinterRawOStream printer(stream);
      info.print(printer);
    }
    return true;
  }

 private:
  std::shared_ptr<std::string> errors_;
};

// Whatever the bitcode was built for, it is now for `isa`, and nothing stands in the way of inlining.
void retarget(llvm::Module& module, CpuIsa isa) {
  const IsaTarget& target = isa_target(isa);
  for (llvm::Function& function : module) {
    for (const char* name : {"target-cpu", "target-features", "tune-cpu", "min-legal-vector-width", "frame-pointer",
                             "prefer-vector-width", "stack-protector-buffer-size"})
      function.removeFnAttr(name);
    for (const auto kind :
         {llvm::Attribute::NoInline, llvm::Attribute::OptimizeNone, llvm::Attribute::UWTable,
          llvm::Attribute::StackProtect, llvm::Attribute::StackProtectReq, llvm::Attribute::StackProtectStrong})
      function.removeFnAttr(kind);
    if (function.isIntrinsic()) continue;
    function.addFnAttr("target-cpu", target.cpu);
    if (!target.features.empty()) function.addFnAttr("target-features", target.features);
    function.addFnAttr("tune-cpu", host_cpu_name());
    if (isa >= CpuIsa::kAvx512) function.addFnAttr("prefer-vector-width", "512");
    function.addFnAttr(llvm::Attribute::NoUnwind);
  }
}

// What tile.cpp documents as needed for straight vector code.
void optimise(llvm::Module& module, llvm::TargetMachine& machine, llvm::StringRef entry) {
  llvm::LoopAnalysisManager loops;
  llvm::FunctionAnalysisManager functions;
  llvm::CGSCCAnalysisManager sccs;
  llvm::ModuleAnalysisManager modules;
  llvm::PassBuilder builder(&machine);
  builder.registerModuleAnalyses(modules);
  builder.registerCGSCCAnalyses(sccs);
  builder.registerFunctionAnalyses(functions);
  builder.registerLoopAnalyses(loops);
  builder.crossRegisterProxies(loops, functions, sccs, modules);

  llvm::ModulePassManager passes;
  passes.addPass(llvm::InternalizePass([entry](const llvm::GlobalValue& value) {
    return llvm::is_contained(
        {entry, llvm::StringRef(kRowsEntry), llvm::StringRef(kSinkOffsetsEntry), llvm::StringRef(kRowShiftsEntry),
         llvm::StringRef(kTileKindEntry), llvm::StringRef(kKvRangeEntry), llvm::StringRef(kQRangeEntry)},
        value.getName());
  }));
  passes.addPass(llvm::AlwaysInlinerPass(/*InsertLifetimeIntrinsics=*/false));
  passes.addPass(llvm::GlobalDCEPass());
  llvm::FunctionPassManager function;
  const auto clean_and_hoist = [&function] {
    function.addPass(llvm::SROAPass(llvm::SROAOptions::ModifyCFG));
    function.addPass(llvm::EarlyCSEPass(/*UseMemorySSA=*/true));
    function.addPass(llvm::InstCombinePass());
    function.addPass(llvm::createFunctionToLoopPassAdaptor(llvm::LICMPass(llvm::LICMOptions()), /*UseMemorySSA=*/true));
  };
  // Before vectorising, too: a captured tensor's pointer and strides must be out of the loop for the vectoriser to see
  // that neighbouring lanes read neighbouring elements.
  clean_and_hoist();
  function.addPass(llvm::LoopVectorizePass());
  clean_and_hoist();
  passes.addPass(llvm::createModuleToFunctionPassAdaptor(std::move(function)));
  passes.run(module, modules);
}

bool emit(llvm::Module& module, llvm::TargetMachine& machine, llvm::CodeGenFileType type,
          llvm::SmallVectorImpl<char>& out) {
  llvm::raw_svector_ostream stream(out);
  llvm::legacy::PassManager passes;
  if (machine.addPassesToEmitFile(passes, stream, nullptr, type, /*DisableVerify=*/true)) return false;
  passes.run(module);
  return true;
}

std::unique_ptr<llvm::TargetMachine> target_machine(CpuIsa isa, llvm::CodeGenOptLevel level, std::string& error) {
  static std::once_flag once;
  std::call_once(once, [] {
    LLVMInitializeX86TargetInfo();
    LLVMInitializeX86Target();
    LLVMInitializeX86TargetMC();
    LLVMInitializeX86AsmPrinter();
  });
  const llvm::Triple triple("x86_64-pc-linux-gnu");
  const llvm::Target* target = llvm::TargetRegistry::lookupTarget(triple, error);
  if (!target) return nullptr;
  const IsaTarget& names = isa_target(isa);
  llvm::TargetOptions options;
  options.MCOptions.AsmVerbose = true;
  std::unique_ptr<llvm::TargetMachine> machine(target->createTargetMachine(
      triple, names.cpu, names.features, options, llvm::Reloc::PIC_, std::nullopt, level, /*JIT=*/true));
  if (!machine) error = "no x86-64 code generator";
  return machine;
}

llvm::Expected<std::unique_ptr<llvm::Module>> read_bitcode(llvm::StringRef bitcode, llvm::StringRef name,
                                                           llvm::LLVMContext& context) {
  // Functions that nobody calls are never read.
  return llvm::getLazyBitcodeModule(llvm::MemoryBufferRef(bitcode, name), context);
}

llvm::StringRef bytes(const cpu::EmbeddedBitcode& bitcode) {
  return {reinterpret_cast<const char*>(bitcode.data), bitcode.size};
}

}  // namespace

std::string_view cpu_isa_name(CpuIsa isa) { return isa_target(isa).name; }

CpuIsa host_cpu_isa() {
  static const CpuIsa best = [] {
    const llvm::StringMap<bool> host = llvm::sys::getHostCPUFeatures();
    const auto has = [&host](std::initializer_list<const char*> names) {
      return llvm::all_of(names, [&](const char* name) { return host.lookup(name); });
    };
    // The x86-64 levels that the code is generated for.
    if (!has({"avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe"})) return CpuIsa::kSse2;
    if (!has({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})) return CpuIsa::kAvx2;
    return has({"avx512bf16"}) ? CpuIsa::kAvx512Bf16 : CpuIsa::kAvx512;
  }();
  return best;
}

CpuTemplate tile_template(CpuIsa isa) {
  return {bytes(cpu::tile_bitcode(static_cast<int>(isa))), "attnjit_tile", true};
}

CpuTemplate gradient_tile_template(CpuIsa isa) {
  return {bytes(cpu::gradient_tile_bitcode(static_cast<int>(isa))), "attnjit_gradient_tile", true, true};
}

CpuTemplate tile_facts_template() { return {.bitcode = {}, .entry = kTileKindEntry}; }

CodegenResult compile_object(std::unique_ptr<llvm::Module> mod, const CpuTemplate& around,
                             const CompileOptions& options, PhaseTimes& phases) {
  // Shared with the context, which outlives this call.
  const auto errors = std::make_shared<std::string>();
  llvm::LLVMContext& context = mod->getContext();
  context.setDiagnosticHandler(std::make_unique<Diagnostics>(errors));
  const auto failed = [&errors](const std::string& what, llvm::Error error = llvm::Error::success()) {
    if (error) *errors += llvm::toString(std::move(error));
    return CodegenResult{nullptr, errors->empty() ? what : what + ": " + *errors};
  };
  // Straight code that is asked once per tile is not worth the milliseconds of good registers and schedules.
  const llvm::CodeGenOptLevel level =
      around.bitcode.empty() ? llvm::CodeGenOptLevel::None : llvm::CodeGenOptLevel::Default;
  std::unique_ptr<llvm::TargetMachine> machine = target_machine(options.isa, level, *errors);
  if (!machine) return failed("cannot generate code for this machine");

  std::unique_ptr<llvm::Module> module;
  {
    const PhaseTimer timer(phases, "link");
    mod->setTargetTriple(machine->getTargetTriple());
    mod->setDataLayout(machine->createDataLayout());
    const bool stages_reads = mod->getFunction("attnjit_lane_rows") != nullptr;
    if (around.bitcode.empty()) {
      module = std::move(mod);
    } else {
      auto read = read_bitcode(around.bitcode, "template", context);
      if (!read) return failed("embedded bitcode cannot be read", read.takeError());
      module = std::move(*read);
      if (llvm::Error error = module->materializeAll())
        return failed("embedded bitcode cannot be read", std::move(error));
      if (llvm::Linker::linkModules(*module, std::move(mod))) return failed("the mod does not link");
    }
    if (stages_reads) {
      auto read = read_bitcode(bytes(cpu::rows_bitcode(static_cast<int>(options.isa))), "rows", context);
      if (!read) return failed("embedded bitcode cannot be read", read.takeError());
      if (llvm::Linker::linkModules(*module, std::move(*read))) return failed("the rows do not link");
    }
    auto read = read_bitcode(bytes(cpu::functions_bitcode(static_cast<int>(options.isa))), "functions", context);
    if (!read) return failed("embedded bitcode cannot be read", read.takeError());
    if (llvm::Linker::linkModules(*module, std::move(*read), llvm::Linker::LinkOnlyNeeded))
      return failed("the functions do not link");
    retarget(*module, options.isa);
  }
  {
    const PhaseTimer timer(phases, "optimise");
    optimise(*module, *machine, around.entry);
  }
  if (options.dump) {
    std::string text;
    llvm::raw_string_ostream stream(text);
    module->print(stream, nullptr);
    options.dump("llvm", text);
    // Code generation changes the module: the listing gets a copy.
    std::unique_ptr<llvm::TargetMachine> lister = target_machine(options.isa, level, *errors);
    llvm::SmallVector<char, 0> listing;
    const std::unique_ptr<llvm::Module> copy = llvm::CloneModule(*module);
    if (lister && emit(*copy, *lister, llvm::CodeGenFileType::AssemblyFile, listing))
      options.dump("asm", {listing.data(), listing.size()});
  }
  CodegenResult result;
  {
    const PhaseTimer timer(phases, "codegen");
    llvm::SmallVector<char, 0> object;
    if (!emit(*module, *machine, llvm::CodeGenFileType::ObjectFile, object))
      return failed("this machine's code generator writes no objects");
    if (!errors->empty()) return failed("code generation failed");
    result.object = std::make_unique<llvm::SmallVectorMemoryBuffer>(std::move(object), "attnjit", false);
  }
  return result;
}

}  // namespace attnjit::compiler
