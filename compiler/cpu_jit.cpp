// One ORC JIT for the process; every object gets a library of its own in it.
#include "compiler/cpu_jit.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

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
  explicit LoadedCode(orc::JITDylib& library) : library_(library) {}
  ~LoadedCode() override { llvm::consumeError(jit().lljit->getExecutionSession().removeJITDylib(library_)); }
  void* entry() const override { return entries_.front().second; }
  void* find(llvm::StringRef name) const override {
    for (const auto& [known, address] : entries_)
      if (known == name) return address;
    return nullptr;
  }
  // Returns what went wrong, or nothing.
  llvm::Error look_up(llvm::StringRef name) {
    auto address = jit().lljit->lookup(library_, name);
    if (!address) return address.takeError();
    entries_.emplace_back(name.str(), address->toPtr<void*>());
    return llvm::Error::success();
  }

 private:
  orc::JITDylib& library_;
  std::vector<std::pair<std::string, void*>> entries_;
};

}  // namespace

LoadResult load_object(std::unique_ptr<llvm::MemoryBuffer> object, llvm::ArrayRef<llvm::StringRef> entries) {
  Jit& shared = jit();
  if (!shared.error.empty()) return {nullptr, shared.error};
  orc::ExecutionSession& session = shared.lljit->getExecutionSession();
  orc::JITDylib& library = session.createBareJITDylib("mod" + std::to_string(shared.next++));
  library.addToLinkOrder(*shared.host);
  // Owns the library from here on.
  auto code = std::make_shared<LoadedCode>(library);
  if (llvm::Error error = shared.lljit->addObjectFile(library, std::move(object)))
    return {nullptr, llvm::toString(std::move(error))};
  for (const llvm::StringRef entry : entries)
    if (llvm::Error error = code->look_up(entry)) return {nullptr, llvm::toString(std::move(error))};
  return {std::move(code), {}};
}

}  // namespace attnjit::compiler
