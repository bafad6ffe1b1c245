// The texts of a compile as files, where ATTNJIT_DUMP asks for them.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "runtime/context.h"

namespace attnjit::runtime {

// Receives a text of a compile; `kind` as compiler::CompileOptions::dump names it.
using CollectText = std::function<void(std::string_view kind, std::string_view text)>;

class DumpFiles {
 public:
  // Files are named after `key`; `header` is put in front of every text, as comments.
  DumpFiles(const Context& context, std::string_view key, std::string header);

  bool wants(std::string_view kind) const;
  bool any() const;
  // `part` tells several texts of one kind apart; mostly empty. A file that cannot be written is a warning in the log.
  void write(std::string_view kind, std::string_view part, std::string_view text) const;
  // Hands texts to the files that are wanted and to `collect`, which may be null; null where nobody wants any. Refers
  // to both.
  CollectText collector(const CollectText& collect) const;

 private:
  const Context& context_;
  std::string header_;
  std::string name_;
};

}  // namespace attnjit::runtime
