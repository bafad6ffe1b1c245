// Expression to facts and native code for the CPU, and the cache of code that problems share.
#include "compiler/compiler.h"

#include <map>
#include <mutex>
#include <tuple>

#include "compiler/cpu_compile.h"
#include "compiler/frontend.h"
#include "llvm/Support/raw_ostream.h"
#include "llvm/Support/xxhash.h"

namespace attnjit::compiler {
namespace {

llvm::XXH128_hash_t hash_text(llvm::StringRef text) {
  return llvm::xxh3_128bits({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
}

std::string printed(const llvm::Module& module) {
  std::string text;
  llvm::raw_string_ostream stream(text);
  module.print(stream, nullptr);
  return text;
}

// Code by the exact text it is made from, as long as somebody uses it.
class CodeCache {
 public:
  using Key = std::tuple<std::uint64_t, std::uint64_t, int, std::string>;

  std::shared_ptr<const NativeCode> find(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto found = codes_.find(key);
    return found == codes_.end() ? nullptr : found->second.lock();
  }

  // What is to be used: `code`, or what another thread was first with.
  std::shared_ptr<const NativeCode> insert(const Key& key, std::shared_ptr<const NativeCode> code) {
    const std::lock_guard lock(mutex_);
    std::erase_if(codes_, [](const auto& entry) { return entry.second.expired(); });
    std::weak_ptr<const NativeCode>& slot = codes_[key];
    if (auto first = slot.lock()) return first;
    slot = code;
    return code;
  }

  static CodeCache& shared() {
    static CodeCache* const cache = new CodeCache;
    return *cache;
  }

 private:
  std::mutex mutex_;
  std::map<Key, std::weak_ptr<const NativeCode>> codes_;
};

class CompiledTile : public CpuTile {
 public:
  explicit CompiledTile(CompiledMod compiled) : compiled_(std::move(compiled)) {}
  cpu::TileFn function() const override { return reinterpret_cast<cpu::TileFn>(compiled_.code->entry()); }
  double score_factor() const override { return compiled_.score_factor; }
  std::span<const dsl::DType> staged() const override { return compiled_.staged; }
  cpu::RowsFn rows() const override { return reinterpret_cast<cpu::RowsFn>(compiled_.code->find(kRowsEntry)); }
  cpu::TileFacts tile_facts() const override { return tile_facts_of(*compiled_.code); }
  const ModFacts& facts() const override { return compiled_.facts; }
  const PhaseTimes& phases() const override { return compiled_.phases; }

 private:
  CompiledMod compiled_;
};

class CompiledGradientTile : public CpuGradientTile {
 public:
  explicit CompiledGradientTile(CompiledMod compiled) : compiled_(std::move(compiled)) {}
  cpu::GradientTileFn function() const override {
    return reinterpret_cast<cpu::GradientTileFn>(compiled_.code->entry());
  }
  std::span<const CpuPlaces> places() const override { return compiled_.places; }
  cpu::SinkOffsetsFn sink_offsets() const override {
    return reinterpret_cast<cpu::SinkOffsetsFn>(compiled_.code->find(kSinkOffsetsEntry));
  }
  cpu::RowShiftsFn row_shifts() const override {
    return reinterpret_cast<cpu::RowShiftsFn>(compiled_.code->find(kRowShiftsEntry));
  }
  std::span<const dsl::DType> staged() const override { return compiled_.staged; }
  cpu::RowsFn rows() const override { return reinterpret_cast<cpu::RowsFn>(compiled_.code->find(kRowsEntry)); }
  cpu::TileFacts tile_facts() const override { return tile_facts_of(*compiled_.code); }
  const ModFacts& facts() const override { return compiled_.facts; }
  const PhaseTimes& phases() const override { return compiled_.phases; }

 private:
  CompiledMod compiled_;
};

// What both tiles' compiles end with.
template <typename Tile, typename Compiled>
CompileResult<std::shared_ptr<const Tile>> tile_of(CompileResult<CompiledMod> compiled) {
  CompileResult<std::shared_ptr<const Tile>> result;
  if (compiled.error) {
    result.error = std::move(compiled.error);
  } else {
    result.value = std::make_shared<Compiled>(std::move(compiled.value));
  }
  return result;
}

CompileResult<ModFacts> facts_of(const Frontend& frontend, bool ran) {
  CompileResult<ModFacts> result;
  if (ran) {
    result.value = frontend.facts();
  } else {
    result.error = CompileError{frontend.error()};
  }
  return result;
}

// The native code of `mod` in `around`, which has `entries`: compiled, or shared. Appends its phases to `phases`.
LoadResult code_of(std::unique_ptr<llvm::Module> mod, const CpuTemplate& around,
                   llvm::ArrayRef<llvm::StringRef> entries, const CompileOptions& options, PhaseTimes& phases) {
  const llvm::XXH128_hash_t hash = hash_text(printed(*mod));
  const CodeCache::Key key{hash.low64, hash.high64, static_cast<int>(options.isa), around.entry.str()};
  // A dump shows the compile, so there has to be one.
  if (!options.dump) {
    if (auto code = CodeCache::shared().find(key)) return {std::move(code), {}};
  }
  CodegenResult object = compile_object(std::move(mod), around, options, phases);
  if (!object.object) return {nullptr, object.error};
  const PhaseTimer timer(phases, "load");
  LoadResult loaded = load_object(std::move(object.object), entries);
  if (!loaded.code) return {nullptr, "the code does not load: " + loaded.error};
  return {CodeCache::shared().insert(key, std::move(loaded.code)), {}};
}

// Why this machine cannot run code for `isa`; empty where it can.
std::string refuse(CpuIsa isa) {
  if (isa <= host_cpu_isa()) return {};
  return "this machine cannot run " + std::string(cpu_isa_name(isa)) + " code, its best is " +
         std::string(cpu_isa_name(host_cpu_isa()));
}

void add_tile_entries(const ModFacts& facts, llvm::SmallVectorImpl<llvm::StringRef>& entries) {
  if (facts.knows_tiles) entries.push_back(kTileKindEntry);
  if (facts.knows_kv_range) entries.push_back(kKvRangeEntry);
  if (facts.knows_q_range) entries.push_back(kQRangeEntry);
}

}  // namespace

cpu::TileFacts tile_facts_of(const NativeCode& code) {
  return {.kind = reinterpret_cast<cpu::TileKindFn>(code.find(kTileKindEntry)),
          .kv_range = reinterpret_cast<cpu::TileRangeFn>(code.find(kKvRangeEntry)),
          .q_range = reinterpret_cast<cpu::TileRangeFn>(code.find(kQRangeEntry))};
}

CompileResult<CompiledMod> compile_mod(const ModProblem& problem, const CompileOptions& options,
                                       const CpuTemplate& around) {
  CompileResult<CompiledMod> result;
  CompiledMod& compiled = result.value;
  const auto fail = [&](std::string message) {
    result.error = CompileError{std::move(message)};
    return std::move(result);
  };
  if (std::string refused = refuse(options.isa); !refused.empty()) return fail(std::move(refused));
  Frontend frontend(compiled.phases);
  const bool ran = around.backward ? frontend.run_backward(problem, options, Target::kCpu)
                                   : frontend.run(problem, options, Target::kCpu);
  if (!ran) return fail(frontend.error());
  llvm::LLVMContext context;
  std::unique_ptr<llvm::Module> mod = frontend.lower(problem, around.stages_reads, context);
  if (!mod) return fail(frontend.error());
  compiled.facts = frontend.facts();
  compiled.score_factor = frontend.score_factor();
  compiled.staged = frontend.staged();
  compiled.places = frontend.places();

  llvm::SmallVector<llvm::StringRef> entries{around.entry};
  if (!compiled.staged.empty()) entries.push_back(kRowsEntry);
  if (!compiled.facts.sinks.empty()) entries.push_back(kSinkOffsetsEntry);
  if (llvm::any_of(compiled.facts.sinks, [](const SinkFacts& sink) { return sink.row_shift; }))
    entries.push_back(kRowShiftsEntry);
  add_tile_entries(compiled.facts, entries);
  LoadResult loaded = code_of(std::move(mod), around, entries, options, compiled.phases);
  if (!loaded.code) return fail(std::move(loaded.error));
  compiled.code = std::move(loaded.code);
  return result;
}

CompileResult<ModFacts> analyze(const ModProblem& problem, const CompileOptions& options) {
  PhaseTimes phases;
  Frontend frontend(phases);
  return facts_of(frontend, frontend.run(problem, options, Target::kCpu));
}

CompileResult<ModFacts> analyze_gradients(const ModProblem& problem, const CompileOptions& options) {
  PhaseTimes phases;
  Frontend frontend(phases);
  return facts_of(frontend, frontend.run_backward(problem, options, Target::kCpu));
}

CompileResult<std::shared_ptr<const CpuTile>> compile_cpu_tile(const ModProblem& problem,
                                                               const CompileOptions& options) {
  return tile_of<CpuTile, CompiledTile>(compile_mod(problem, options, tile_template(options.isa)));
}

CompileResult<std::shared_ptr<const cpu::TileFacts>> compile_cpu_tile_facts(const ModProblem& problem,
                                                                            const CompileOptions& options) {
  CompileResult<std::shared_ptr<const cpu::TileFacts>> result;
  const auto fail = [&](std::string message) {
    result.error = CompileError{std::move(message)};
    return std::move(result);
  };
  if (std::string refused = refuse(options.isa); !refused.empty()) return fail(std::move(refused));
  PhaseTimes phases;
  Frontend frontend(phases);
  if (!frontend.run_tile_facts(problem)) return fail(frontend.error());
  const ModFacts& facts = frontend.facts();
  if (!facts.knows_tiles || facts.tiles_read_captured) return result;
  llvm::LLVMContext context;
  std::unique_ptr<llvm::Module> mod = frontend.lower_tile_facts(context);
  if (!mod) return fail(frontend.error());
  llvm::SmallVector<llvm::StringRef> entries;
  add_tile_entries(facts, entries);
  LoadResult loaded = code_of(std::move(mod), tile_facts_template(), entries, options, phases);
  if (!loaded.code) return fail(std::move(loaded.error));
  struct Held {
    std::shared_ptr<const NativeCode> code;
    cpu::TileFacts facts;
  };
  const auto held = std::make_shared<const Held>(loaded.code, tile_facts_of(*loaded.code));
  result.value = {held, &held->facts};
  return result;
}

CompileResult<std::shared_ptr<const CpuGradientTile>> compile_cpu_gradient_tile(const ModProblem& problem,
                                                                                const CompileOptions& options) {
  return tile_of<CpuGradientTile, CompiledGradientTile>(
      compile_mod(problem, options, gradient_tile_template(options.isa)));
}

}  // namespace attnjit::compiler
