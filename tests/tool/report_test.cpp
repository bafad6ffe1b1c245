// Reports and the statistics in them.
#include "bench/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

namespace attnjit::tool {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

Cell cell(const std::string& mod, std::int64_t seqlen, double eager, double compiled) {
  Cell c;
  c.mod = mod;
  c.dtype = "bfloat16";
  c.backend = "cpu";
  c.shape = {1, 16, seqlen, 16, seqlen, 64};
  c.forward.eager = {eager, eager * 0.5, eager * 2};
  c.forward.compiled = {compiled, compiled * 0.5, compiled * 2};
  c.forward.flops = c.shape.flops();
  c.forward.verdict = {.ok = true, .max_error = 1e-3, .o_of_bound = 0.25, .lse_of_bound = 0.125};
  return c;
}

Report sample() {
  Report report;
  report.header = {{"attnjit", "0.1.0"}, {"command", "attnjit bench score-mod"}};
  report.cells = {cell("noop", 512, 2.0, 1.0), cell("a | b, \"c\"", 512, 8.0, 1.0)};
  report.compiles = {{"noop", 12.5, 0.0, 0.01, 1, 1}};
  return report;
}

TEST(Statistics, OfKnownSamples) {
  const std::vector<double> odd{3, 1, 2}, even{4, 1, 3, 2}, powers{1, 4, 16};
  EXPECT_EQ(median(odd), 2);
  EXPECT_EQ(median(even), 2.5);
  EXPECT_EQ(arithmetic_mean(powers), 7);
  EXPECT_DOUBLE_EQ(geometric_mean(powers), 4);
  EXPECT_EQ(summarize(even).min, 1);
  EXPECT_EQ(summarize(even).max, 4);
}

TEST(Statistics, TimesInTurnAndPerCall) {
  std::string order;
  const auto sleep = [&](char name, int milliseconds) {
    order += name;
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
  };
  const std::function<void()> candidates[] = {[&] { sleep('a', 2); }, [&] { sleep('b', 6); }};
  const std::vector<Timing> timings = time_interleaved(candidates, 3, 1.0);
  EXPECT_EQ(order,
            "aabb"
            "ababab");
  EXPECT_GE(timings[0].min, 2.0);
  EXPECT_GE(timings[1].min, 6.0);

  int calls = 0;
  const std::function<void()> quick[] = {[&] { ++calls; }};
  EXPECT_LT(time_interleaved(quick, 1, 0.05)[0].median, 0.05);
  EXPECT_GT(calls, 10) << "a quick candidate is repeated within a sample";
}

TEST(Report, GithubTableNamesEverything) {
  const std::string text = format_report(sample(), ReportFormat::kGithub);
  EXPECT_THAT(text, HasSubstr("command: attnjit bench score-mod\n"));
  EXPECT_THAT(text, HasSubstr("(1, 16, 512, 16, 512, 64)"));
  EXPECT_THAT(text, HasSubstr("2.000 [1.000..4.000]"));
  EXPECT_THAT(text, HasSubstr("a \\| b"));
  EXPECT_THAT(text, HasSubstr("| Average (geometric)  |   4.000 |"));
  EXPECT_THAT(text, HasSubstr("| Average (arithmetic) |   5.000 |"));
  EXPECT_THAT(text, HasSubstr("| Max                  |   8.000 | a \\|"));
  EXPECT_THAT(text, HasSubstr("| Min                  |   2.000 | noop"));
  EXPECT_THAT(text, HasSubstr("All 2 cells pass."));
  // Every table has lines of one length.
  std::istringstream lines(text);
  std::size_t width = 0;
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line[0] != '|') {
      width = 0;
    } else {
      if (width != 0) {
        EXPECT_EQ(line.size(), width) << line;
      }
      width = line.size();
    }
  }
}

TEST(Report, AWrongCellIsShownAndLeftOutOfTheAverages) {
  Report report = sample();
  report.cells[1].forward.verdict = {.ok = false,
                                     .max_error = 0.5,
                                     .o_of_bound = std::numeric_limits<double>::infinity(),
                                     .why = "row b=0 h=1 q_idx=2: o[3] is 1"};
  EXPECT_FALSE(report.ok());
  const std::string text = format_report(report, ReportFormat::kGithub);
  EXPECT_THAT(text, HasSubstr("WRONG"));
  EXPECT_THAT(text, HasSubstr("1 of 2 cells are WRONG"));
  EXPECT_THAT(text, HasSubstr("o[3] is 1"));
  EXPECT_THAT(text, HasSubstr("| Average (geometric)  |   2.000 |"));
  EXPECT_THAT(text, Not(HasSubstr("pass.")));
  const auto json = nlohmann::json::parse(format_report(report, ReportFormat::kJson));
  EXPECT_EQ(json["wrong"], 1);
  EXPECT_EQ(json["cells"][1]["pass"], false);
  EXPECT_TRUE(json["cells"][1]["o_of_bound"].is_null());
  EXPECT_THAT(format_report(report, ReportFormat::kCsv), HasSubstr(",false\n"));
}

TEST(Report, NoRightCellMeansNoSpeedup) {
  Report report = sample();
  for (Cell& c : report.cells) c.forward.verdict.ok = false;
  EXPECT_THAT(format_report(report, ReportFormat::kGithub), Not(HasSubstr("Average")));
  EXPECT_FALSE(nlohmann::json::parse(format_report(report, ReportFormat::kJson)).contains("summary"));
}

TEST(Report, CsvQuotesAndJsonParses) {
  const std::string csv = format_report(sample(), ReportFormat::kCsv);
  EXPECT_THAT(csv, HasSubstr("\"a | b, \"\"c\"\"\",1,16,512,16,512,64,bfloat16,cpu,8,4,16,1,0.5,2,,8,"));
  Report report = sample();
  report.cells[0].mod = "\xff";
  const auto json = nlohmann::json::parse(format_report(report, ReportFormat::kJson));
  EXPECT_EQ(json["summary"]["max"]["speedup"], 8.0);
  EXPECT_EQ(json["cells"][0]["shape"]["seqlen_kv"], 512);
}

TEST(Report, HostTimesOfTheGpuStandApart) {
  Report report = sample();
  EXPECT_THAT(format_report(report, ReportFormat::kGithub), Not(HasSubstr("host (us)")));
  report.cells[0].forward.host_us = 3.21;
  report.cells[0].forward.compiled = {0.0123, 0.0121, 0.0131};
  const std::string text = format_report(report, ReportFormat::kGithub);
  EXPECT_THAT(text, HasSubstr(" TFLOP/s | host (us) | max error |"));
  EXPECT_THAT(text, HasSubstr(" |      3.21 |  1.00e-03 |"));
  EXPECT_THAT(text, HasSubstr("0.0123 [0.0121..0.0131]"));
  EXPECT_THAT(format_report(report, ReportFormat::kCsv), HasSubstr(",0.0123,0.0121,0.0131,3.21,"));
  EXPECT_EQ(nlohmann::json::parse(format_report(report, ReportFormat::kJson))["cells"][0]["host_us"], 3.21);
}

TEST(Report, TheBackwardHasColumnsAndASummaryOfItsOwn) {
  Report report = sample();
  report.cells[0].backward = Pass{.eager = {6.0, 5.0, 7.0},
                                  .compiled = {2.0, 1.5, 2.5},
                                  .verdict = {.ok = true, .max_error = 2e-3, .o_of_bound = 0.5},
                                  .flops = report.cells[0].shape.backward_flops()};
  report.cells[1].backward = Pass{.eager = {1.0, 1.0, 1.0},
                                  .compiled = {2.0, 2.0, 2.0},
                                  .verdict = {.ok = false, .o_of_bound = 3.0, .why = "dq b=0 h=1 row 2: [3] is 1"}};
  EXPECT_FALSE(report.ok());
  std::string text = format_report(report, ReportFormat::kGithub);
  EXPECT_THAT(text, HasSubstr("fwd_speedup | fwd TFLOP/s | fwd max error | fwd of bound | fwd check | "));
  EXPECT_THAT(text, HasSubstr(" | bwd_speedup | bwd TFLOP/s | bwd max error | bwd of bound | bwd check |"));
  EXPECT_THAT(text, HasSubstr("6.000 [5.000..7.000]"));
  EXPECT_THAT(text, HasSubstr("### Forward speedups"));
  EXPECT_THAT(text, HasSubstr("### Backward speedups"));
  EXPECT_THAT(text, HasSubstr("1 of 2 cells are WRONG"));
  EXPECT_THAT(text, HasSubstr("bwd: dq b=0 h=1 row 2"));
  auto json = nlohmann::json::parse(format_report(report, ReportFormat::kJson));
  EXPECT_DOUBLE_EQ(json["backward_summary"]["geometric_mean_speedup"].get<double>(), 3.0);
  EXPECT_EQ(json["summary"]["max"]["speedup"], 8.0);
  EXPECT_EQ(json["cells"][1]["pass"], true);
  EXPECT_EQ(json["cells"][1]["backward"]["pass"], false);
  EXPECT_DOUBLE_EQ(json["cells"][0]["backward"]["tflops"].get<double>(), 2.5 * report.cells[0].shape.flops() / 2e9);
  EXPECT_THAT(format_report(report, ReportFormat::kCsv), HasSubstr(",bwd_speedup,"));

  report.cells[1].backward.reset();  // not every cell needs one
  text = format_report(report, ReportFormat::kGithub);
  EXPECT_THAT(text, HasSubstr("All 2 cells pass."));
}

TEST(Report, CountsBothProducts) {
  const Cell c = cell("noop", 1024, 2.0, 1.0);
  EXPECT_DOUBLE_EQ(c.shape.flops(), 4.0 * 16 * 1024 * 1024 * 64);
  EXPECT_DOUBLE_EQ(c.forward.tflops(), c.shape.flops() / 1e9);
}

}  // namespace
}  // namespace attnjit::tool
