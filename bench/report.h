// The report of a sweep: one cell per shape and mod, a summary of the speedups, as a table, CSV or JSON.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bench/judge.h"
#include "bench/statistics.h"

namespace attnjit::tool {

// (B, Hq, Sq, Hkv, Skv, D): in the order of PyTorch's flex-attention benchmark.
struct Shape {
  std::int64_t batch = 1, heads_q = 1, seqlen_q = 1, heads_kv = 1, seqlen_kv = 1, head_dim = 1;
  std::string text() const;  // "(1, 16, 512, 16, 512, 64)"
  // Floating-point operations of the two products over all of Sq x Skv: what a mask lets a kernel skip is counted.
  double flops() const;
  // Of the backward's five products, likewise.
  double backward_flops() const { return 2.5 * flops(); }
};

// What was measured of the forward or of the backward of a cell.
struct Pass {
  Timing eager, compiled;  // milliseconds of a call
  double host_us = 0.0;    // of the calling thread for one compiled call, where that is another time; else 0
  Verdict verdict;
  double flops = 0.0;  // that a compiled call is counted with
  double speedup() const { return eager.median / compiled.median; }
  double tflops() const { return flops / compiled.median / 1e9; }
};

struct Cell {
  std::string mod, dtype, backend;
  Shape shape;
  Pass forward;
  std::optional<Pass> backward;
  bool ok() const { return forward.verdict.ok && (!backward || backward->verdict.ok); }
};

// Milliseconds that preparing a mod took.
struct CompileRow {
  std::string mod;
  double cold = 0.0;       // the first problem: the expression is compiled
  double new_shape = 0.0;  // median over further shapes; 0 if there were none
  double cached = 0.0;     // median, the same problem once more
  int prepared = 0;        // problems
  int compiles = 0;        // of native code, for all of them
};

struct Report {
  std::vector<std::pair<std::string, std::string>> header;  // name, value
  std::vector<Cell> cells;
  std::vector<CompileRow> compiles;
  bool ok() const;
};

enum class ReportFormat { kGithub, kCsv, kJson };
std::optional<ReportFormat> report_format_named(std::string_view name);

// Ends with a newline.
std::string format_report(const Report& report, ReportFormat format);

// A table in GitHub's Markdown, columns aligned: right where `right` says so, `rows` as long as `columns`.
std::string github_table(const std::vector<std::string>& columns, const std::vector<bool>& right,
                         const std::vector<std::vector<std::string>>& rows);

}  // namespace attnjit::tool
