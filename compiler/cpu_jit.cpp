// One ORC JIT for the process; every object gets a library of its own in it.
#include "compiler/cpu_jit.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "llvm/ExecutionEngine/Orc/AbsoluteSymbols.h"
#include "llvm/ExecutionEngine/Orc/LLJIT.h"

namespace attnjit::compiler {
namespace {

namespace orc = llvm::orc;

// The JIT and the library of host functions, or why there is none.
struct Jit {
  std::unique_ptr<orc::LLJIT> lljit;
  orc::JITDylib* host = nullptr;
  std::string error;
  std::atomic<std::uint64_t> next{0};

  Jit() {
    // No platform: the code has no initialisers, no thread-locals, no unwind tables.
    orc::LLJITBuilder builder;
    builder.setJITTargetMachineBuilder(orc::JITTargetMachineBuilder(llvm::Triple("x86_64-pc-linux-gnu")));
    builder.setLinkProcessSymbolsByDefault(false);
    builder.setPlatformSetUp(orc::setUpInactivePlatform);
    auto created = builder.create();
    if (!created) {
      error = llvm::toString(created.takeError());
      return;
    }
    lljit = std::move(*created);
    lljit->getExecutionSession().setErrorReporter([](llvm::Error e) { llvm::consumeError(std::move(e)); });
    host = &lljit->getExecutionSession().createBareJITDylib("host");
    if (llvm::Error e = host->define(orc::absoluteSymbols(host_functions()))) error = llvm::toString(std::move(e));
  }

  // What instructions without an encoding on some instruction set become; resolved by address, because a process that
  // loads this library need not have them in its global scope.
  orc::SymbolMap host_functions() {
    orc::SymbolMap symbols;
    const auto add = [&](const char* name, auto* function) {
      symbols[lljit->mangleAndIntern(name)] = {orc::ExecutorAddr::fromPtr(function), llvm::JITSymbolFlags::Exported};
    };
    add("floorf", static_cast<float (*)(float)>(&::floorf));
    add("ceilf", static_cast<float (*)(float)>(&::ceilf));
    add("roundevenf", static_cast<float (*)(float)>(&::roundevenf));
    add("memcpy", static_cast<void* (*)(void*, const void*, std::size_t)>(&std::memcpy));
    add("memmove", static_cast<void* (*)(void*, const void*, std::size_t)>(&std::memmove));
    add("memset", static_cast<void* (*)(void*, int, std::size_t)>(&std::memset));
    return symbols;
  }
};

// Never destroyed: code may still be alive when static objects go.
Jit& jit() {
  static Jit* const shared = new Jit;
  return *shared;
}

class LoadedCode : public NativeCode {
 public:
  LoadedCode(orc::JITDylib& library, void* entry, void* rows_entry)
      : library_(library), entry_(entry), rows_entry_(rows_entry) {}
  ~LoadedCode() override { llvm::consumeError(jit().lljit->getExecutionSession().removeJITDylib(library_)); }
  void* entry() const override { return entry_; }
  void* rows_entry() const override { return rows_entry_; }

 private:
  orc::JITDylib& library_;
  void* entry_;
  void* rows_entry_;
};

}  // namespace

LoadResult load_object(std::unique_ptr<llvm::MemoryBuffer> object, llvm::StringRef entry, llvm::StringRef rows_entry) {
  Jit& shared = jit();
  if (!shared.error.empty()) return {nullptr, shared.error};
  orc::ExecutionSession& session = shared.lljit->getExecutionSession();
  orc::JITDylib& library = session.createBareJITDylib("mod" + std::to_string(shared.next++));
  library.addToLinkOrder(*shared.host);
  const auto failed = [&](llvm::Error error) {
    LoadResult result{nullptr, llvm::toString(std::move(error))};
    llvm::consumeError(session.removeJITDylib(library));
    return result;
  };
  if (llvm::Error error = shared.lljit->addObjectFile(library, std::move(object))) return failed(std::move(error));
  auto address = shared.lljit->lookup(library, entry);
  if (!address) return failed(address.takeError());
  void* rows = nullptr;
  if (!rows_entry.empty()) {
    auto found = shared.lljit->lookup(library, rows_entry);
    if (!found) return failed(found.takeError());
    rows = found->toPtr<void*>();
  }
  return {std::make_shared<LoadedCode>(library, address->toPtr<void*>(), rows), {}};
}

}  // namespace attnjit::compiler
