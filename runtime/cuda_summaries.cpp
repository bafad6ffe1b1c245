// Lays out the tables of captured values' extremes and launches their kernel.
#include "runtime/cuda_summaries.h"

#include <utility>

#include "kernels_templates/cuda/summaries.h"
#include "runtime/cuda_binaries.h"

namespace attnjit::runtime {
namespace {

static_assert(cuda::kSummaryBlockValues == compiler::kSummaryBlock);

constexpr std::size_t kAlignment = 256;
constexpr const char* kEntry = "attnjit_summarize";

cuda::SummaryType type_of(dsl::DType dtype) {
  switch (dtype) {
    case dsl::DType::kBool:
      return cuda::SummaryType::kBool;
    case dsl::DType::kUInt8:
      return cuda::SummaryType::kUInt8;
    case dsl::DType::kInt8:
      return cuda::SummaryType::kInt8;
    case dsl::DType::kInt16:
      return cuda::SummaryType::kInt16;
    case dsl::DType::kInt32:
      return cuda::SummaryType::kInt32;
    default:
      return cuda::SummaryType::kInt64;
  }
}

}  // namespace

compiler::CompileResult<compiler::EmittedCuda> emit_summarised(
    compiler::ModProblem problem,
    const std::function<compiler::CompileResult<compiler::EmittedCuda>(const compiler::ModProblem&)>& emit) {
  problem.summaries = true;
  auto emitted = emit(problem);
  // A tensor of many rows may be read at few of them, and is summarised whole.
  constexpr std::int64_t kMostElements = 1 << 24;
  std::int64_t elements = 0;
  for (const compiler::TileSummary& summary : emitted.value.facts.summaries) {
    std::int64_t own = 1;
    const auto& capture = problem.captures[static_cast<std::size_t>(summary.capture)];
    for (const std::int64_t extent : compiler::summary_extents(capture, summary.dimension)) own *= extent;
    elements += own;
  }
  if (emitted.error || elements <= kMostElements) return emitted;
  problem.summaries = false;
  return emit(problem);
}

Result<std::optional<FoundBinary>> find_summary_kernel(const Request& request, const compiler::ModFacts& facts,
                                                       compiler::CudaArch arch, compiler::PhaseTimes* phases) {
  if (facts.summaries.empty()) return std::optional<FoundBinary>();
  Result<FoundBinary> found = find_cuda_binary(request.context, compiler::cuda_summaries(), arch, {});
  if (!found) return found.failure();
  add_phases(found->phases, phases);
  return std::optional(std::move(*found));
}

Json summary_kernel_json(const FoundBinary& found) { return binary_json(found, kEntry); }

Result<std::shared_ptr<const CudaSummaries>> CudaSummaries::load(const std::shared_ptr<CudaDevice>& device,
                                                                 const FoundBinary& found,
                                                                 const compiler::ModProblem& problem,
                                                                 const std::vector<compiler::TileSummary>& summaries) {
  Result<std::shared_ptr<const CudaKernel>> kernel = CudaKernel::load(device, found.binary->cubin, kEntry, 0);
  if (!kernel) return kernel.failure();
  const auto loaded = std::make_shared<CudaSummaries>();
  loaded->kernel_ = std::move(*kernel);
  for (const compiler::TileSummary& summary : summaries) {
    const compiler::CaptureInfo& capture = problem.captures[static_cast<std::size_t>(summary.capture)];
    Table table{
        .of = summary, .extents = compiler::summary_extents(capture, summary.dimension), .offset = loaded->size_};
    std::size_t bytes = capture.dtype == dsl::DType::kInt64 ? sizeof(std::int64_t) : sizeof(std::int32_t);
    for (const std::int64_t extent : table.extents) bytes *= static_cast<std::size_t>(extent);
    loaded->size_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    loaded->tables_.push_back(std::move(table));
  }
  loaded->counter_at_ = loaded->size_;
  loaded->size_ += kAlignment;
  return std::shared_ptr<const CudaSummaries>(loaded);
}

Check CudaSummaries::fill(const ForwardCall& call, void* memory, CudaStream stream) const {
  cuda::SummaryParams params = {};
  params.counter = counter(memory);
  std::int64_t rows = 0;
  for (const Table& table : tables_) {
    const dsl::CaptureView& capture = call.captures[table.of.capture];
    cuda::SummaryTable& to = params.tables[params.count++];
    to = {.data = capture.data,
          .table = static_cast<char*>(memory) + table.offset,
          .stride = capture.stride[table.of.dimension],
          .row_stride = {},
          .extent = static_cast<int>(capture.extent[table.of.dimension]),
          .inner = 1,
          .blocks = static_cast<int>(table.extents.back()),
          .levels = static_cast<int>(table.extents[table.extents.size() - 2]),
          .first_row = static_cast<int>(rows),
          .type = type_of(capture.dtype)};
    // A view has room for three dimensions in the place of one, so that there are two others at most.
    std::int64_t own_rows = 1;
    for (int d = capture.rank - 1, at = 1; d >= 0; --d) {
      if (d == table.of.dimension) continue;
      to.row_stride[at] = capture.stride[d];
      if (at == 1) to.inner = static_cast<int>(capture.extent[d]);
      own_rows *= capture.extent[d];
      --at;
    }
    rows += own_rows;
  }
  return kernel_->launch({.x = static_cast<unsigned>(rows)}, cuda::kSummaryThreads, &params, stream);
}

void CudaSummaries::fill_views(const ForwardCall& call, void* memory, cuda::CapturedView* views) const {
  for (std::size_t i = 0; i < tables_.size(); ++i) {
    const Table& table = tables_[i];
    cuda::CapturedView& view = views[call.num_captures + i];
    view = {.data = static_cast<char*>(memory) + table.offset, .value = 0, .stride = {}, .extent = {}};
    for (int& extent : view.extent) extent = 1;
    std::int64_t stride = 1;
    for (std::size_t d = table.extents.size(); d-- > 0;) {
      view.extent[d] = static_cast<int>(table.extents[d]);
      view.stride[d] = stride;
      stride *= table.extents[d];
    }
  }
}

}  // namespace attnjit::runtime
