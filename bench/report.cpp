// The report of a sweep.
#include "bench/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace attnjit::tool {

namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kShapeName = "shape(B,Hq,M,Hkv,N,D)";

// The passes of a report: how columns and headings call them, and where a cell has one, or null.
struct PassName {
  std::string_view prefix, adjective;
  const Pass* (*of)(const Cell&);
};
constexpr PassName kForward = {"fwd", "Forward", [](const Cell& cell) { return &cell.forward; }};
constexpr PassName kBackward = {
    "bwd", "Backward", [](const Cell& cell) -> const Pass* { return cell.backward ? &*cell.backward : nullptr; }};

std::vector<PassName> passes_of(const Report& report) {
  std::vector<PassName> passes = {kForward};
  if (std::ranges::any_of(report.cells, [](const Cell& cell) { return cell.backward.has_value(); })) {
    passes.push_back(kBackward);
  }
  return passes;
}

struct Summary {
  double geometric, arithmetic;
  const Cell &max, &min;
  double max_speedup, min_speedup;
};

// Of the cells that are right: a wrong result's speed is no speedup.
std::optional<Summary> summary_of(const Report& report, const PassName& name) {
  std::vector<const Cell*> right;
  std::vector<double> speedups;
  for (const Cell& cell : report.cells) {
    const Pass* const pass = name.of(cell);
    if (pass == nullptr || !pass->verdict.ok) continue;
    right.push_back(&cell);
    speedups.push_back(pass->speedup());
  }
  if (right.empty()) return std::nullopt;
  const auto max = std::ranges::max_element(speedups), min = std::ranges::min_element(speedups);
  return Summary{.geometric = geometric_mean(speedups),
                 .arithmetic = arithmetic_mean(speedups),
                 .max = *right[static_cast<std::size_t>(max - speedups.begin())],
                 .min = *right[static_cast<std::size_t>(min - speedups.begin())],
                 .max_speedup = *max,
                 .min_speedup = *min};
}

std::size_t num_wrong(const Report& report) {
  return static_cast<std::size_t>(std::ranges::count_if(report.cells, [](const Cell& c) { return !c.ok(); }));
}

// A GPU's calls may take some microseconds.
std::string timing(const Timing& t) {
  const int digits = t.median < 1.0 ? 4 : 3;
  return fmt::format("{:.{}f} [{:.{}f}..{:.{}f}]", t.median, digits, t.min, digits, t.max, digits);
}

bool has_host_times(const Report& report) {
  return std::ranges::any_of(report.cells, [](const Cell& cell) { return cell.forward.host_us > 0.0; });
}

// A bar would end the cell.
std::string escape_bars(const std::string& text) {
  std::string escaped;
  for (char c : text) {
    if (c == '|') escaped += '\\';
    escaped += c == '\n' ? ' ' : c;
  }
  return escaped;
}

std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string field = "\"";
  for (char c : text) {
    if (c == '"') field += '"';
    field += c;
  }
  return field + "\"";
}

std::string csv_line(const std::vector<std::string>& fields) {
  std::string line;
  for (const std::string& field : fields) {
    if (!line.empty()) line += ',';
    line += csv_field(field);
  }
  return line + "\n";
}

// JSON has no infinity; the field is null and `pass` says the rest.
Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

// What was not judged is said beside the verdict.
std::string verdict_text(const Verdict& verdict) {
  std::string text = verdict.ok ? "pass" : "WRONG";
  if (verdict.left_out > 0) text += fmt::format(", {} of {} rows left out", verdict.left_out, verdict.rows);
  if (verdict.unbounded > 0) text += fmt::format(", {} of {} rows without a bound", verdict.unbounded, verdict.rows);
  return text;
}

std::string github_report(const Report& report) {
  std::string text;
  for (const auto& [name, value] : report.header) text += fmt::format("- {}: {}\n", name, value);
  text += "\n";

  const std::vector<PassName> passes = passes_of(report);
  const bool host = has_host_times(report);
  std::vector<std::string> columns = {"score_mod", std::string(kShapeName), "dtype"};
  std::vector<bool> right = {false, false, false};
  const auto column = [&](std::string name, bool to_the_right = true) {
    columns.push_back(std::move(name));
    right.push_back(to_the_right);
  };
  for (const PassName& name : passes) {
    // The forward's have no prefix where they stand alone.
    const std::string prefix = passes.size() == 1 ? std::string() : fmt::format("{} ", name.prefix);
    column(fmt::format("{}_eager_time (ms)", name.prefix));
    column(fmt::format("{}_compiled_time (ms)", name.prefix));
    column(fmt::format("{}_speedup", name.prefix));
    column(prefix + "TFLOP/s");
    if (host) column(prefix + "host (us)");
    column(prefix + "max error");
    column(prefix + "of bound");
    column(prefix + "check", false);
  }
  std::vector<std::vector<std::string>> rows;
  rows.reserve(report.cells.size());
  for (const Cell& cell : report.cells) {
    std::vector<std::string>& row =
        rows.emplace_back(std::vector{escape_bars(cell.mod), cell.shape.text(), cell.dtype});
    for (const PassName& name : passes) {
      const Pass* const pass = name.of(cell);
      if (pass == nullptr) {
        row.insert(row.end(), host ? 8 : 7, "-");
        continue;
      }
      const Verdict& verdict = pass->verdict;
      row.insert(row.end(), {timing(pass->eager), timing(pass->compiled), fmt::format("{:.3f}", pass->speedup()),
                             fmt::format("{:.3f}", pass->tflops())});
      if (host) row.push_back(fmt::format("{:.2f}", pass->host_us));
      row.insert(row.end(),
                 {fmt::format("{:.2e}", verdict.max_error),
                  fmt::format("{:.3f}", std::max(verdict.o_of_bound, verdict.lse_of_bound)), verdict_text(verdict)});
    }
  }
  text += github_table(columns, right, rows);

  for (const PassName& name : passes) {
    const std::optional<Summary> summary = summary_of(report, name);
    if (!summary) continue;
    rows = {{"Average (geometric)", fmt::format("{:.3f}", summary->geometric), "", "", ""},
            {"Average (arithmetic)", fmt::format("{:.3f}", summary->arithmetic), "", "", ""}};
    const auto extreme = [&](const char* type, const Cell& cell, double speedup) {
      rows.push_back({type, fmt::format("{:.3f}", speedup), escape_bars(cell.mod), cell.shape.text(), cell.dtype});
    };
    extreme("Max", summary->max, summary->max_speedup);
    extreme("Min", summary->min, summary->min_speedup);
    text += fmt::format("\n### {} speedups\n\n", name.adjective);
    text += github_table({"Type", "Speedup", "score_mod", std::string(kShapeName), "dtype"},
                         {false, true, false, false, false}, rows);
  }

  rows.clear();
  for (const CompileRow& row : report.compiles) {
    rows.push_back({escape_bars(row.mod), fmt::format("{:.2f}", row.cold),
                    row.new_shape > 0 ? fmt::format("{:.2f}", row.new_shape) : "-", fmt::format("{:.4f}", row.cached),
                    fmt::format("{}", row.prepared), fmt::format("{}", row.compiles)});
  }
  text += "\n### Compile time\n\n";
  text += github_table({"score_mod", "cold (ms)", "further shape (ms)", "cached (ms)", "shapes", "compiles"},
                       {false, true, true, true, true, true}, rows);

  if (const std::size_t wrong = num_wrong(report)) {
    text += fmt::format("\n{} of {} cells are WRONG (left out of the averages):\n", wrong, report.cells.size());
    for (const Cell& cell : report.cells) {
      for (const PassName& name : passes) {
        const Pass* const pass = name.of(cell);
        if (pass == nullptr || pass->verdict.ok) continue;
        text += fmt::format("- {} {} {}{}: {}\n", cell.mod, cell.shape.text(), cell.dtype,
                            passes.size() == 1 ? "" : fmt::format(" {}", name.prefix), pass->verdict.why);
      }
    }
  } else {
    text += fmt::format("\nAll {} cells pass.\n", report.cells.size());
  }
  return text;
}

std::string csv_report(const Report& report) {
  std::string text;
  for (const auto& [name, value] : report.header) text += fmt::format("# {}: {}\n", name, value);
  const std::vector<PassName> passes = passes_of(report);
  std::vector<std::string> names = {"score_mod", "batch",    "heads_q", "seqlen_q", "heads_kv",
                                    "seqlen_kv", "head_dim", "dtype",   "backend"};
  for (const PassName& name : passes) {
    for (const char* field : {"eager_ms", "eager_min_ms", "eager_max_ms", "compiled_ms", "compiled_min_ms",
                              "compiled_max_ms", "host_us", "speedup", "tflops", "max_error", "o_of_bound",
                              "lse_of_bound", "rows", "rows_left_out", "rows_without_bound", "pass"}) {
      names.push_back(&name == passes.data() ? field : fmt::format("{}_{}", name.prefix, field));
    }
  }
  text += csv_line(names);
  const auto number = [](double value) { return fmt::format("{:.6g}", value); };
  for (const Cell& cell : report.cells) {
    const Shape& s = cell.shape;
    std::vector<std::string> fields = {cell.mod,
                                       fmt::to_string(s.batch),
                                       fmt::to_string(s.heads_q),
                                       fmt::to_string(s.seqlen_q),
                                       fmt::to_string(s.heads_kv),
                                       fmt::to_string(s.seqlen_kv),
                                       fmt::to_string(s.head_dim),
                                       cell.dtype,
                                       cell.backend};
    for (const PassName& name : passes) {
      const Pass* const pass = name.of(cell);
      if (pass == nullptr) {
        fields.insert(fields.end(), 16, "");
        continue;
      }
      const Verdict& verdict = pass->verdict;
      fields.insert(
          fields.end(),
          {number(pass->eager.median), number(pass->eager.min), number(pass->eager.max), number(pass->compiled.median),
           number(pass->compiled.min), number(pass->compiled.max), pass->host_us > 0.0 ? number(pass->host_us) : "",
           number(pass->speedup()), number(pass->tflops()), number(verdict.max_error), number(verdict.o_of_bound),
           number(verdict.lse_of_bound), fmt::to_string(verdict.rows), fmt::to_string(verdict.left_out),
           fmt::to_string(verdict.unbounded), verdict.ok ? "true" : "false"});
    }
    text += csv_line(fields);
  }
  return text;
}

std::string json_report(const Report& report) {
  Json root;
  for (const auto& [name, value] : report.header) root["header"][name] = value;
  const auto json_timing = [](const Timing& t) { return Json{{"median", t.median}, {"min", t.min}, {"max", t.max}}; };
  const auto json_config = [](const Cell& cell) {
    const Shape& s = cell.shape;
    return Json{{"score_mod", cell.mod},
                {"shape",
                 {{"batch", s.batch},
                  {"heads_q", s.heads_q},
                  {"seqlen_q", s.seqlen_q},
                  {"heads_kv", s.heads_kv},
                  {"seqlen_kv", s.seqlen_kv},
                  {"head_dim", s.head_dim}}},
                {"dtype", cell.dtype}};
  };
  const auto json_pass = [&](const Pass& pass) {
    Json row = {{"eager_ms", json_timing(pass.eager)}, {"compiled_ms", json_timing(pass.compiled)}};
    if (pass.host_us > 0.0) row["host_us"] = pass.host_us;
    row["speedup"] = pass.speedup();
    row["tflops"] = pass.tflops();
    row["max_error"] = number(pass.verdict.max_error);
    row["o_of_bound"] = number(pass.verdict.o_of_bound);
    row["lse_of_bound"] = number(pass.verdict.lse_of_bound);
    row["rows"] = pass.verdict.rows;
    row["rows_left_out"] = pass.verdict.left_out;
    row["rows_without_bound"] = pass.verdict.unbounded;
    row["pass"] = pass.verdict.ok;
    if (!pass.verdict.ok) row["why"] = pass.verdict.why;
    return row;
  };
  root["cells"] = Json::array();
  for (const Cell& cell : report.cells) {
    Json row = json_config(cell);
    row["backend"] = cell.backend;
    row.update(json_pass(cell.forward));
    if (cell.backward) row["backward"] = json_pass(*cell.backward);
    root["cells"].push_back(row);
  }
  for (const PassName& name : passes_of(report)) {
    const std::optional<Summary> summary = summary_of(report, name);
    if (!summary) continue;
    const auto extreme = [&](const Cell& cell, double speedup) {
      Json row = json_config(cell);
      row["speedup"] = speedup;
      return row;
    };
    root[name.of == kForward.of ? "summary" : "backward_summary"] = {
        {"geometric_mean_speedup", summary->geometric},
        {"arithmetic_mean_speedup", summary->arithmetic},
        {"max", extreme(summary->max, summary->max_speedup)},
        {"min", extreme(summary->min, summary->min_speedup)}};
  }
  root["compile"] = Json::array();
  for (const CompileRow& row : report.compiles) {
    root["compile"].push_back({{"score_mod", row.mod},
                               {"cold_ms", row.cold},
                               {"new_shape_ms", row.new_shape > 0 ? Json(row.new_shape) : Json(nullptr)},
                               {"cached_ms", row.cached},
                               {"shapes", row.prepared},
                               {"compiles", row.compiles}});
  }
  root["wrong"] = num_wrong(report);
  // A header value comes from the machine: replace what is not UTF-8 rather than fail.
  return root.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace

std::string Shape::text() const {
  return fmt::format("({}, {}, {}, {}, {}, {})", batch, heads_q, seqlen_q, heads_kv, seqlen_kv, head_dim);
}

double Shape::flops() const {
  return 4.0 * static_cast<double>(batch) * static_cast<double>(heads_q) * static_cast<double>(seqlen_q) *
         static_cast<double>(seqlen_kv) * static_cast<double>(head_dim);
}

bool Report::ok() const { return num_wrong(*this) == 0; }

std::optional<ReportFormat> report_format_named(std::string_view name) {
  if (name == "github") return ReportFormat::kGithub;
  if (name == "csv") return ReportFormat::kCsv;
  if (name == "json") return ReportFormat::kJson;
  return std::nullopt;
}

std::string format_report(const Report& report, ReportFormat format) {
  switch (format) {
    case ReportFormat::kGithub:
      return github_report(report);
    case ReportFormat::kCsv:
      return csv_report(report);
    case ReportFormat::kJson:
      return json_report(report);
  }
  return {};
}

std::string github_table(const std::vector<std::string>& columns, const std::vector<bool>& right,
                         const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> width;
  width.reserve(columns.size());
  for (const std::string& column : columns) width.push_back(std::max<std::size_t>(column.size(), 3));
  for (const auto& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) width[i] = std::max(width[i], row[i].size());
  }
  const auto line = [&](const std::vector<std::string>& fields) {
    std::string text = "|";
    for (std::size_t i = 0; i < fields.size(); ++i) {
      text += right[i] ? fmt::format(" {:>{}} |", fields[i], width[i]) : fmt::format(" {:<{}} |", fields[i], width[i]);
    }
    return text + "\n";
  };
  std::string text = line(columns) + "|";
  for (std::size_t i = 0; i < columns.size(); ++i) {
    text += right[i] ? std::string(width[i] + 1, '-') + ":|" : std::string(width[i] + 2, '-') + "|";
  }
  text += "\n";
  for (const auto& row : rows) text += line(row);
  return text;
}

}  // namespace attnjit::tool
