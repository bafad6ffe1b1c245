// Every refusal of the C interface: its status, and that the message names the argument, what it was, what is allowed.
#include <gmock/gmock.h>

#include <bit>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>

#include "test_problem.h"

namespace attnjit::test {
namespace {

using testing::HasSubstr;

class Errors : public testing::Test {
 protected:
  // attnjit_prepare refuses with `status` and a message that holds every fragment.
  void expect_prepare(attnjit_status status, std::initializer_list<const char*> fragments) {
    attnjit_plan* plan = reinterpret_cast<attnjit_plan*>(this);
    ASSERT_EQ(attnjit_prepare(context_.get(), &p_.attention, &plan), status) << attnjit_last_error();
    EXPECT_EQ(plan, nullptr);
    for (const char* fragment : fragments) EXPECT_THAT(attnjit_last_error(), HasSubstr(fragment));
  }
  void expect_invalid(std::initializer_list<const char*> fragments) {
    expect_prepare(ATTNJIT_INVALID_ARGUMENT, fragments);
  }

  // attnjit_run of a plan that was prepared before `change` refuses.
  void expect_run(const std::function<void()>& change, std::initializer_list<const char*> fragments) {
    const PlanPtr plan = prepare(context_, p_.attention);
    ASSERT_TRUE(plan);
    const Scratch scratch(plan.get());
    change();
    ASSERT_EQ(attnjit_run(plan.get(), &p_.attention, scratch.data, scratch.size, nullptr), ATTNJIT_INVALID_ARGUMENT);
    for (const char* fragment : fragments) EXPECT_THAT(attnjit_last_error(), HasSubstr(fragment));
    EXPECT_TRUE(std::isnan(p_.o_data[0])) << "a refused run wrote";
  }

  ContextPtr context_ = make_context();
  Problem p_;
};

TEST_F(Errors, NullHandles) {
  EXPECT_EQ(attnjit_context_create(nullptr, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "context is NULL");
  attnjit_plan* plan = nullptr;
  EXPECT_EQ(attnjit_prepare(nullptr, &p_.attention, &plan), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "context is NULL");
  EXPECT_EQ(attnjit_prepare(context_.get(), &p_.attention, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "plan is NULL");
  EXPECT_EQ(attnjit_prepare(context_.get(), nullptr, &plan), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "attention is NULL");
  EXPECT_EQ(attnjit_run(nullptr, &p_.attention, nullptr, 0, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "plan is NULL");
  EXPECT_EQ(attnjit_explain(context_.get(), &p_.attention, nullptr, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "json is NULL");
  EXPECT_EQ(attnjit_cache_list(context_.get(), 0, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "json is NULL");
  EXPECT_EQ(attnjit_cache_clear(nullptr, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "context is NULL");
  EXPECT_EQ(attnjit_reference(context_.get(), &p_.attention, nullptr, 1, nullptr, nullptr, nullptr),
            ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "rows is NULL");
  attnjit_context_destroy(nullptr);
  attnjit_plan_destroy(nullptr);
  attnjit_free(nullptr);
  EXPECT_EQ(attnjit_plan_workspace_size(nullptr), 0u);
  EXPECT_STREQ(attnjit_plan_description(nullptr), "");
}

TEST_F(Errors, ContextOptions) {
  attnjit_context* context = nullptr;
  attnjit_context_options options = ATTNJIT_CONTEXT_OPTIONS_INIT;
  options.num_threads = -1;
  EXPECT_EQ(attnjit_context_create(&options, &context), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "options.num_threads is -1; allowed: 0 to 1024");
  options.num_threads = 1025;
  EXPECT_EQ(attnjit_context_create(&options, &context), ATTNJIT_INVALID_ARGUMENT);
  options = {4, 1};
  EXPECT_EQ(attnjit_context_create(&options, &context), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("options.struct_size is 4"));
  // A later, longer struct: fine as long as what is new there is unused.
  struct {
    attnjit_context_options known;
    void* later;
  } longer = {{sizeof(longer), 1}, &longer};
  EXPECT_EQ(attnjit_context_create(&longer.known, &context), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("does not know"));
  EXPECT_EQ(context, nullptr);
}

TEST_F(Errors, StructSize) {
  // The last one as memory that nobody has set may hold it: nothing behind the struct is looked at.
  for (const std::size_t size : {std::size_t{8}, std::size_t{0}, std::size_t{0xcdcdcdcdcdcd}}) {
    p_.attention.struct_size = size;
    expect_invalid({"attention.struct_size is", "ATTNJIT_ATTENTION_INIT"});
  }
  p_.attention.struct_size = sizeof(attnjit_attention);
  // A later, longer struct: fine as long as what is new there is unused.
  struct {
    attnjit_attention known;
    void* later;
  } longer = {p_.attention, nullptr};
  longer.known.struct_size = sizeof(longer);
  attnjit_plan* plan = nullptr;
  EXPECT_EQ(attnjit_prepare(context_.get(), &longer.known, &plan), ATTNJIT_OK) << attnjit_last_error();
  attnjit_plan_destroy(plan);
  longer.later = &longer;
  EXPECT_EQ(attnjit_prepare(context_.get(), &longer.known, &plan), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("does not know"));
}

TEST_F(Errors, MissingTensor) {
  p_.attention.q = nullptr;
  expect_invalid({"q is NULL"});
  p_.attention.q = &p_.q.dl;
  p_.attention.o = nullptr;
  expect_invalid({"o is NULL"});
}

TEST_F(Errors, Device) {
  p_.k.dl.device = {kDLCUDA, 1};
  expect_invalid({"k is on CUDA device 1 and q on the CPU; all tensors of a call are on one device"});
  p_.q.dl.device = {kDLCUDAManaged, 0};
  expect_invalid({"k is on CUDA device 1 and q on CUDA device 0"});
  p_.q.dl.device = {kDLCUDA, 1};
  expect_invalid({"v is on the CPU and q on CUDA device 1"});
  p_.v.dl.device = p_.o.dl.device = p_.lse.dl.device = {kDLCUDA, 1};
  expect_invalid({"row_max is on the CPU and q on CUDA device 1"});
  p_.row_max.dl.device = {kDLCUDA, 1};
  float table[4] = {}, slope = 1;
  p_.attention.score_mod = "score + table[h] * slope";
  Tensor& tensor = p_.capture("table", table, {4});
  p_.capture("slope", &slope, {});
  expect_invalid({"captured table is on the CPU and q on CUDA device 1"});
  tensor.dl.device = {kDLCUDA, 0};
  expect_invalid({"captured table is on CUDA device 0 and q on CUDA device 1"});
  tensor.dl.device = {kDLCUDA, 1};
  p_.captured[1]->dl.device = {kDLCUDA, 0};
  expect_invalid({"captured slope is on CUDA device 0 and q on CUDA device 1", ", or a scalar on the CPU"});
  p_.q.dl.device = {kDLCUDA, -1};
  expect_invalid({"q is on CUDA device -1; allowed: 0 and up"});
  p_.q.dl.device = {kDLMetal, 0};
  expect_invalid(
      {"q is on device type 8; allowed: 1 (CPU), 2 (CUDA), 3 (CUDA, pinned CPU memory), 13 (CUDA, managed)"});
  // The oracle stays on the CPU.
  p_.q.dl.device = {kDLCUDA, 0};
  const attnjit_row row = {0, 0, 0};
  double lse;
  EXPECT_EQ(attnjit_reference(context_.get(), &p_.attention, &row, 1, nullptr, &lse, nullptr),
            ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "q is on CUDA device 0; the reference reads CPU memory");
}

TEST_F(Errors, Backends) {
  attnjit_context_options options = ATTNJIT_CONTEXT_OPTIONS_INIT;
  options.backends = 1u << ATTNJIT_BACKEND_MATH;
  attnjit_context* raw = nullptr;
  ASSERT_EQ(attnjit_context_create(&options, &raw), ATTNJIT_OK) << attnjit_last_error();
  context_.reset(raw);
  EXPECT_EQ(attnjit_plan_backend(prepare(context_, p_.attention).get()), ATTNJIT_BACKEND_MATH);
  p_.attention.backend = ATTNJIT_BACKEND_CPU;
  expect_prepare(ATTNJIT_UNSUPPORTED,
                 {"no permitted backend serves B=2 Hq=4 Hkv=2 Sq=40 Skv=50 D=16 Dv=24 float32 on the CPU; ",
                  "cpu: not permitted by the context's options or ATTNJIT_BACKENDS", "math: not asked for"});
  options.backends = 1u;  // AUTO is none
  EXPECT_EQ(attnjit_context_create(&options, &raw), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "options.backends is 0x1; allowed: 0, or bits of 0x1e");
}

TEST_F(Errors, Rank) {
  p_.q.shape = {2, 40, 16};
  p_.q.sync();
  expect_invalid({"q has 3 dimensions; it needs 4: (batch, heads, sequence, head_dim)"});
}

TEST_F(Errors, Dtype) {
  p_.v.dl.dtype = {kDLFloat, 64, 1};
  expect_invalid({"v has dtype float64", "allowed: float32, float16, bfloat16"});
  p_.v.dl.dtype = kI32;
  expect_invalid({"v has dtype int32", "allowed: float32, float16, bfloat16"});
  p_.v.dl.dtype = {kDLFloat, 32, 4};
  expect_invalid({"v has dtype float32 with 4 lanes"});
  p_.v.dl.dtype = {99, 32, 1};
  expect_invalid({"v has dtype type code 99"});
  p_.v.dl.dtype = {kDLFloat, 16, 1};
  expect_invalid({"v has dtype float16; it needs q's, float32"});
  p_.v.dl.dtype = kF32;
  p_.o.dl.dtype = {kDLBfloat, 16, 1};
  expect_invalid({"o has dtype bfloat16; it needs q's, float32"});
}

TEST_F(Errors, Shape) {
  p_.q.dl.shape = nullptr;
  expect_invalid({"q has a NULL shape"});
  p_.q.sync();
  p_.q.shape[2] = -1;
  expect_invalid({"q has shape (2, 4, -1, 16)", "allowed extents: 0 to 2147483647"});
  p_.q.shape[2] = std::int64_t{1} << 40;
  expect_invalid({"q has shape (2, 4, 1099511627776, 16)", "allowed extents"});
  p_.q.shape[2] = 40;
  p_.k.shape[0] = 3;
  expect_invalid({"k has shape (3, 2, 50, 16)", "= (2, 2, 50, 16), batch and head_dim as q's"});
  p_.k.shape[0] = 2;
  p_.k.shape[3] = 32;
  expect_invalid({"k has shape (2, 2, 50, 32)", "= (2, 2, 50, 16)"});
  p_.k.shape[3] = 16;
  p_.v.shape[2] = 49;
  expect_invalid({"v has shape (2, 2, 49, 24)", "= (2, 2, 50, 24), batch, heads and sequence as k's"});
  p_.v.shape[2] = 50;
  p_.o.shape[3] = 16;
  expect_invalid({"o has shape (2, 4, 40, 16)", "(batch, heads, seqlen_q, head_dim_v) = (2, 4, 40, 24)"});
}

TEST_F(Errors, HeadDim) {
  p_.q.shape[3] = p_.k.shape[3] = 257;
  expect_invalid({"q has shape (2, 4, 40, 257)", "allowed head dimensions: 1 to 256"});
  p_.q.shape[3] = p_.k.shape[3] = 0;
  expect_invalid({"q has shape (2, 4, 40, 0)", "allowed head dimensions: 1 to 256"});
  p_.q.shape[3] = p_.k.shape[3] = 16;
  p_.v.shape[3] = 512;
  expect_invalid({"v has shape (2, 2, 50, 512)", "allowed head dimensions: 1 to 256"});
}

TEST_F(Errors, Heads) {
  p_.k.shape[1] = p_.v.shape[1] = 3;
  expect_invalid({"q has 4 heads and k has 3; q's must be a multiple of k's"});
  p_.k.shape[1] = p_.v.shape[1] = 0;
  expect_invalid({"q has 4 heads and k has 0"});
}

TEST_F(Errors, Strides) {
  p_.q.strides = {2560, 640, 16, 2};
  p_.q.sync();
  expect_invalid({"q has strides (2560, 640, 16, 2); the innermost one must be 1"});
  p_.q.strides = {2560, -640, 16, 1};
  p_.q.sync();
  expect_invalid({"q has strides (2560, -640, 16, 1); a negative one is not allowed"});
  p_.q.strides = {2560, std::int64_t{1} << 62, 16, 1};
  p_.q.sync();
  expect_invalid({"q has shape (2, 4, 40, 16) and strides (2560, 4611686018427387904, 16, 1)", "exceeds 64 bits"});
}

TEST_F(Errors, TooManyElements) {
  const std::int64_t huge = std::numeric_limits<std::int32_t>::max();
  p_.q.shape = {huge, huge, huge, 16};
  p_.q.sync();
  expect_invalid({"q has shape (2147483647, 2147483647, 2147483647, 16)", "number of elements exceeds 64 bits"});
}

TEST_F(Errors, OutputOverlapsItself) {
  p_.o.strides = {0, 960, 24, 1};
  p_.o.sync();
  expect_invalid({"o has shape (2, 4, 40, 24) and strides (0, 960, 24, 1)", "elements overlap"});
  p_.o.strides = {3840, 960, 23, 1};
  p_.o.sync();
  expect_invalid({"o has shape", "elements overlap"});
  p_.o.strides.clear();
  p_.o.sync();
  p_.lse.strides = {160, 0, 1};
  p_.lse.sync();
  expect_invalid({"lse has shape (2, 4, 40) and strides (160, 0, 1)", "elements overlap"});
}

TEST_F(Errors, RowOutputs) {
  p_.lse.dl.dtype = {kDLFloat, 16, 1};
  expect_invalid({"lse has dtype float16; allowed: float32"});
  p_.lse.dl.dtype = kF32;
  p_.row_max.shape = {2, 4, 41};
  p_.row_max.sync();
  expect_invalid({"row_max has shape (2, 4, 41); it needs (batch, heads, seqlen_q) = (2, 4, 40) from q"});
  p_.row_max.shape = {2, 4, 40, 1};
  p_.row_max.sync();
  expect_invalid({"row_max has 4 dimensions; it needs 3: (batch, heads, seqlen_q)"});
}

TEST_F(Errors, Scale) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    p_.attention.scale = &bad;
    expect_invalid({"scale is ", "any finite number is allowed"});
  }
}

TEST_F(Errors, Backend) {
  p_.attention.backend = std::bit_cast<attnjit_backend>(7);
  expect_invalid({"backend is 7; allowed: 0 (auto), 1 (math), 2 (cpu)"});
  p_.attention.backend = ATTNJIT_BACKEND_AUTO;
  p_.attention.max_autotune = 2;
  expect_invalid({"max_autotune is 2; allowed: 0 and 1"});
}

TEST_F(Errors, Captures) {
  float table[8] = {};
  p_.attention.score_mod = "score + table[h]";
  expect_invalid({"captures lacks 'table', which the expression reads with 1 index; given: none"});
  p_.capture("tabel", table, {4});
  expect_invalid({"captures lacks 'table'", "given: tabel; did you mean 'tabel'?"});
  p_.captures[0].name = "table";
  p_.capture("other", table, {});
  expect_invalid({"captures has 'other', which no expression reads; read: table"});
  p_.captures[1].name = "table";
  expect_invalid({"captures has 'table' twice"});
  p_.captures[1].name = nullptr;
  expect_invalid({"captures[1].name is NULL"});
  p_.attention.num_captures = 17;
  expect_invalid({"num_captures is 17; allowed: 0 to 16"});
  p_.attention.captures = nullptr;
  p_.attention.num_captures = 1;
  expect_invalid({"captures is NULL, but num_captures is 1"});
}

TEST_F(Errors, LongNamesAreShortened) {
  // As long as the text allows.
  const std::string name(60'000, 'x'), start = "'" + name.substr(0, 57) + "...'", text = "score + " + name + "[h]";
  float table[8] = {};
  const auto expect_short = [this](const std::string& fragment) {
    expect_invalid({fragment.c_str()});
    EXPECT_LT(std::strlen(attnjit_last_error()), 300U);
  };
  p_.attention.score_mod = text.c_str();
  expect_short("captures lacks " + start);
  p_.capture(name.c_str(), table, {4, 2});
  expect_short("captured " + start.substr(1, 60) + " has 2 dimensions");
  p_.attention.score_mod = "score";
  expect_short("captures has " + start + ", which no expression reads");
  p_.captures[0].name = "table";
  p_.attention.score_mod = text.c_str();
  expect_short("given: table");
  p_.capture("empty", table, {0});
  p_.captures[1].name = name.c_str();
  expect_short("captured " + start.substr(1, 60) + " has shape (0,)");
}

TEST_F(Errors, CapturedTensor) {
  float table[8] = {};
  p_.attention.score_mod = "score + table[h]";
  Tensor& tensor = p_.capture("table", table, {4});
  p_.captures[0].tensor = nullptr;
  expect_invalid({"captured table is NULL"});
  p_.captures[0].tensor = &tensor.dl;
  tensor.dl.dtype = {kDLFloat, 64, 1};
  expect_invalid({"captured table has dtype float64; allowed: bool, int8"});
  tensor.dl.dtype = {kDLComplex, 64, 1};
  expect_invalid({"captured table has dtype complex64"});
  tensor.dl.dtype = kF32;
  tensor.shape = {2, 2};
  tensor.sync();
  expect_invalid({"captured table has 2 dimensions; the expression reads it with 1 index"});
  tensor.shape = {0};
  tensor.sync();
  expect_invalid({"captured table has shape (0,); a captured tensor needs at least one element"});
  tensor.shape = {1, 1, 1, 1, 1, 1};
  tensor.sync();
  expect_invalid({"captured table has 6 dimensions; allowed: 0 to 5"});
  tensor.shape = {4};
  tensor.strides = {-1};
  tensor.sync();
  expect_invalid({"captured table has strides (-1,); a negative one is not allowed"});
}

TEST_F(Errors, Expression) {
  p_.attention.score_mod = "score + \n tahn(score)";
  expect_prepare(ATTNJIT_INVALID_EXPRESSION, {"score_mod, line 2, column 2", "tanh", "^"});
  p_.attention.score_mod = "";
  expect_prepare(ATTNJIT_INVALID_EXPRESSION, {"score_mod, line 1"});
  p_.attention.score_mod = nullptr;
  p_.attention.mask_mod = "score > 0";
  expect_prepare(ATTNJIT_INVALID_EXPRESSION, {"mask_mod, line 1, column 1", "score"});
  p_.attention.mask_mod = "q_idx + kv_idx";
  expect_prepare(ATTNJIT_INVALID_EXPRESSION, {"mask_mod, line 1"});
  // Ranks that disagree between the two.
  float table[8] = {};
  p_.attention.score_mod = "score + table[h]";
  p_.attention.mask_mod = "table[b, h] > 0";
  p_.capture("table", table, {4});
  expect_prepare(ATTNJIT_INVALID_EXPRESSION,
                 {"captured 'table' is read with 1 index by score_mod and with 2 indices by mask_mod"});
}

TEST_F(Errors, FailuresAreNotCached) {
  p_.attention.score_mod = "later(score)";
  expect_prepare(ATTNJIT_INVALID_EXPRESSION, {"later"});
  const char* parameter = "x";
  ASSERT_EQ(attnjit_register_mod(context_.get(), "later", &parameter, 1, "x * 2", 0), ATTNJIT_OK)
      << attnjit_last_error();
  EXPECT_TRUE(prepare(context_, p_.attention));
}

TEST_F(Errors, Register) {
  EXPECT_EQ(attnjit_register_mod(context_.get(), "tanh", nullptr, 0, "score", 0), ATTNJIT_INVALID_EXPRESSION);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("mod 'tanh', line 1"));
  EXPECT_EQ(attnjit_register_mod(context_.get(), "bad", nullptr, 0, "score +", 0), ATTNJIT_INVALID_EXPRESSION);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("mod 'bad', line 1"));
  EXPECT_EQ(attnjit_register_mod(context_.get(), "twice", nullptr, 0, "2 * score", 0), ATTNJIT_OK);
  EXPECT_EQ(attnjit_register_mod(context_.get(), "twice", nullptr, 0, "3 * score", 0), ATTNJIT_INVALID_EXPRESSION);
  EXPECT_EQ(attnjit_register_mod(context_.get(), nullptr, nullptr, 0, "score", 0), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "name is NULL");
  EXPECT_EQ(attnjit_register_mod(context_.get(), "x", nullptr, 0, nullptr, 0), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "body is NULL");
  EXPECT_EQ(attnjit_register_mod(context_.get(), "x", nullptr, 2, "score", 0), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "parameters is NULL");
  const char* parameters[] = {"a", nullptr};
  EXPECT_EQ(attnjit_register_mod(context_.get(), "x", parameters, 2, "score", 0), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "parameters[1] is NULL");
}

TEST_F(Errors, ReferenceRows) {
  const attnjit_row rows[2] = {{0, 0, 0}, {1, 4, 0}};
  double lse[2];
  EXPECT_EQ(attnjit_reference(context_.get(), &p_.attention, rows, 2, nullptr, lse, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "rows[1] is (1, 4, 0); allowed (b, h, q_idx): below (2, 4, 40)");
  char* json = nullptr;
  EXPECT_EQ(attnjit_clamped_reads(context_.get(), &p_.attention, rows, 2, &json), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "rows[1] is (1, 4, 0); allowed (b, h, q_idx): below (2, 4, 40)");
  EXPECT_EQ(json, nullptr);
  EXPECT_EQ(attnjit_clamped_reads(context_.get(), &p_.attention, rows, 1, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "json is NULL");
  p_.k.dl.data = nullptr;
  EXPECT_EQ(attnjit_reference(context_.get(), &p_.attention, rows, 1, nullptr, lse, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "k has a NULL data pointer");
}

TEST_F(Errors, ExplainOptions) {
  attnjit_explain_options options = ATTNJIT_EXPLAIN_OPTIONS_INIT;
  char* text = nullptr;
  for (const char* arch : {"", "sm_", "90", "sm_90b", "sm_90aa", "sm_-1", "sm_9", "sm_a"}) {
    options.arch = arch;
    EXPECT_EQ(attnjit_explain(context_.get(), &p_.attention, &options, &text), ATTNJIT_INVALID_ARGUMENT);
    EXPECT_EQ(attnjit_last_error(),
              "options.arch is '" + std::string(arch) + "'; allowed: sm_80, sm_86, sm_89, sm_90, sm_90a, ...");
  }
  options.struct_size = 3;
  EXPECT_EQ(attnjit_explain(context_.get(), &p_.attention, &options, &text), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("options.struct_size is 3"));
  EXPECT_EQ(text, nullptr);
}

TEST_F(Errors, RunData) {
  expect_run([&] { p_.v.dl.data = nullptr; }, {"v has a NULL data pointer"});
  p_.v.dl.data = p_.v_data.data();
  expect_run([&] { p_.v.dl.byte_offset = 2; }, {"v has data at 0x", "byte_offset included", "multiple of 4 bytes"});
}

TEST_F(Errors, RunOverlap) {
  // o over its own q: D and Dv made equal.
  p_.v.shape[3] = p_.o.shape[3] = 16;
  expect_run([&] { p_.o.dl.data = p_.q.dl.data; }, {"o shares memory with q; an output must lie apart"});
  p_.o.dl.data = p_.o_data.data();
  expect_run([&] { p_.o.dl.data = p_.v_data.data(); }, {"o shares memory with v"});
  p_.o.dl.data = p_.o_data.data();
  expect_run([&] { p_.lse.dl.data = p_.o_data.data() + 5; }, {"lse shares memory with o"});
  p_.lse.dl.data = p_.lse_data.data();
  expect_run([&] { p_.row_max.dl.data = p_.lse_data.data(); }, {"row_max shares memory with lse"});
  p_.row_max.dl.data = p_.row_max_data.data();
  p_.attention.score_mod = "score + bias[h]";
  Tensor& bias = p_.capture("bias", p_.row_max_data.data() + 316, {4});
  expect_run([&] { bias.dl.data = p_.row_max_data.data() + 315; }, {"row_max shares memory with bias"});
}

TEST_F(Errors, RunWorkspaceAndStream) {
  const PlanPtr plan = prepare(context_, p_.attention);
  ASSERT_TRUE(plan);
  const Scratch scratch(plan.get());
  ASSERT_GT(scratch.size, 0u);
  const auto run = [&](void* workspace, std::size_t size, void* stream) {
    EXPECT_EQ(attnjit_run(plan.get(), &p_.attention, workspace, size, stream), ATTNJIT_INVALID_ARGUMENT);
    return std::string(attnjit_last_error());
  };
  const std::string needs = "the plan needs " + std::to_string(scratch.size);
  EXPECT_THAT(run(scratch.data, scratch.size - 1, nullptr),
              HasSubstr("workspace_size is " + std::to_string(scratch.size - 1) + "; " + needs));
  EXPECT_THAT(run(nullptr, scratch.size, nullptr), HasSubstr("workspace is NULL; " + needs + " bytes"));
  EXPECT_THAT(run(static_cast<char*>(scratch.data) + 32, scratch.size, nullptr), HasSubstr("multiple of 64 bytes"));
  EXPECT_THAT(run(scratch.data, scratch.size, this), HasSubstr("stream is not NULL"));
  p_.lse.dl.data = scratch.data;
  EXPECT_THAT(run(scratch.data, scratch.size, nullptr), HasSubstr("workspace shares memory with lse"));
}

TEST_F(Errors, RunOfAnotherProblem) {
  float table[8] = {};
  p_.attention.score_mod = "score + table[h]";
  Tensor& tensor = p_.capture("table", table, {4});
  const char* again = "when the plan was prepared and is ";
  expect_run([&] { p_.attention.score_mod = "score - table[h]"; },
             {"score_mod was 'score + table[h]' ", again, "'score - table[h]' now; prepare again"});
  p_.attention.score_mod = "score + table[h]";
  expect_run([&] { p_.attention.mask_mod = "causal"; }, {"mask_mod was NULL ", again, "'causal' now"});
  p_.attention.mask_mod = nullptr;
  expect_run([&] { p_.captures[0].name = "tab"; }, {"the names in captures was (table) ", again, "(tab) now"});
  p_.captures[0].name = "table";
  expect_run([&] { p_.q.shape[2] = p_.o.shape[2] = p_.lse.shape[2] = p_.row_max.shape[2] = 39; },
             {"q's sequence length was 40 ", again, "39 now"});
  p_.q.shape[2] = p_.o.shape[2] = p_.lse.shape[2] = p_.row_max.shape[2] = 40;
  expect_run([&] { p_.k.shape[2] = p_.v.shape[2] = 49; }, {"k's sequence length was 50 ", again, "49 now"});
  p_.k.shape[2] = p_.v.shape[2] = 50;
  expect_run([&] { p_.k.shape[1] = p_.v.shape[1] = 1; }, {"k's number of heads was 2 ", again, "1 now"});
  p_.k.shape[1] = p_.v.shape[1] = 2;
  expect_run([&] { p_.attention.lse = nullptr; }, {"lse was given ", again, "NULL now"});
  p_.attention.lse = &p_.lse.dl;
  expect_run([&] { p_.attention.backend = ATTNJIT_BACKEND_CPU; }, {"backend was auto ", again, "cpu now"});
  p_.attention.backend = ATTNJIT_BACKEND_AUTO;
  expect_run([&] { p_.k.strides = {0, 800, 16, 1}, p_.k.sync(); },
             {"k's stride of dimension 0 was another ", again, "0 now"});
  p_.k.strides.clear();
  p_.k.sync();
  expect_run([&] { tensor.dl.dtype = kI32; }, {"captured table's dtype was float32 ", again, "int32 now"});
  tensor.dl.dtype = kF32;
  expect_run([&] { tensor.shape = {8}; }, {"captured table's shape was (4) ", again, "(8) now"});
  tensor.shape = {4};
  expect_run([&] { tensor.strides = {2}, tensor.sync(); },
             {"captured table's stride of dimension 0 was 1 ", again, "another now"});
}

TEST_F(Errors, MessageStaysUntilTheNextFailure) {
  p_.attention.q = nullptr;
  expect_invalid({"q is NULL"});
  EXPECT_STREQ(attnjit_version(), attnjit_version());
  EXPECT_STREQ(attnjit_last_error(), "q is NULL; a tensor is needed");
}

class BackwardErrors : public testing::Test {
 protected:
  // Refused before a backend is asked: attnjit_prepare_backward refuses with a message that holds every fragment.
  void expect_prepare(std::initializer_list<const char*> fragments) {
    attnjit_plan* plan = reinterpret_cast<attnjit_plan*>(this);
    ASSERT_EQ(attnjit_prepare_backward(context_.get(), &p_.attention, &p_.gradients, nullptr, &plan),
              ATTNJIT_INVALID_ARGUMENT)
        << attnjit_last_error();
    EXPECT_EQ(plan, nullptr);
    for (const char* fragment : fragments) EXPECT_THAT(attnjit_last_error(), HasSubstr(fragment));
  }
  // attnjit_backward refuses, and writes nothing.
  void expect_call(std::initializer_list<const char*> fragments) {
    ASSERT_EQ(attnjit_backward(context_.get(), &p_.attention, &p_.gradients, nullptr, 0, nullptr),
              ATTNJIT_INVALID_ARGUMENT)
        << attnjit_last_error();
    for (const char* fragment : fragments) EXPECT_THAT(attnjit_last_error(), HasSubstr(fragment));
    EXPECT_TRUE(std::isnan(p_.dq_data[0])) << "a refused run wrote";
  }
  // attnjit_run_backward of a plan that was prepared before `change` refuses.
  void expect_run(const std::function<void()>& change, std::initializer_list<const char*> fragments) {
    const PlanPtr plan = prepare_backward(context_, p_);
    ASSERT_TRUE(plan);
    change();
    ASSERT_EQ(attnjit_run_backward(plan.get(), &p_.attention, &p_.gradients, nullptr, 0, nullptr),
              ATTNJIT_INVALID_ARGUMENT);
    for (const char* fragment : fragments) EXPECT_THAT(attnjit_last_error(), HasSubstr(fragment));
    EXPECT_TRUE(std::isnan(p_.dq_data[0])) << "a refused run wrote";
  }

  ContextPtr context_ = make_context();
  GradientProblem p_;
};

TEST_F(BackwardErrors, NullHandles) {
  attnjit_context* const context = context_.get();
  attnjit_plan* forward = reinterpret_cast<attnjit_plan*>(this);
  attnjit_plan* backward = reinterpret_cast<attnjit_plan*>(this);
  EXPECT_EQ(attnjit_prepare_backward(nullptr, &p_.attention, &p_.gradients, &forward, &backward),
            ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "context is NULL");
  EXPECT_EQ(forward, nullptr);
  EXPECT_EQ(backward, nullptr);
  EXPECT_EQ(attnjit_prepare_backward(context, &p_.attention, &p_.gradients, &forward, nullptr),
            ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "backward is NULL");
  EXPECT_EQ(attnjit_prepare_backward(context, nullptr, &p_.gradients, nullptr, &backward), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "attention is NULL");
  EXPECT_EQ(attnjit_prepare_backward(context, &p_.attention, nullptr, nullptr, &backward), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "gradients is NULL");
  EXPECT_EQ(attnjit_backward(context, &p_.attention, nullptr, nullptr, 0, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "gradients is NULL");
  EXPECT_EQ(attnjit_backward(nullptr, &p_.attention, &p_.gradients, nullptr, 0, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "context is NULL");
  EXPECT_EQ(attnjit_run_backward(nullptr, &p_.attention, &p_.gradients, nullptr, 0, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "plan is NULL");
  p_.remove_keys();
  const PlanPtr plan = prepare_backward(context_, p_);
  EXPECT_EQ(attnjit_run_backward(plan.get(), &p_.attention, nullptr, nullptr, 0, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "gradients is NULL");
}

TEST_F(BackwardErrors, StructSize) {
  for (const std::size_t size : {std::size_t{8}, std::size_t{0}, std::size_t{0xcdcdcdcdcdcd}}) {
    p_.gradients.struct_size = size;
    expect_prepare({"gradients.struct_size is", "ATTNJIT_GRADIENTS_INIT"});
  }
  struct {
    attnjit_gradients known;
    void* later;
  } longer = {p_.gradients, &longer};
  longer.known.struct_size = sizeof(longer);
  attnjit_plan* plan = nullptr;
  EXPECT_EQ(attnjit_prepare_backward(context_.get(), &p_.attention, &longer.known, nullptr, &plan),
            ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("gradients sets a field that this library"));
}

TEST_F(BackwardErrors, MissingTensor) {
  p_.attention.lse = nullptr;
  expect_prepare({"lse is NULL; a tensor is needed"});
  p_.attention.lse = &p_.lse.dl;
  p_.attention.o = nullptr;
  expect_prepare({"o is NULL; a tensor is needed"});
  p_.attention.o = &p_.o.dl;
  p_.gradients.grad_out = nullptr;
  expect_prepare({"grad_out is NULL; a tensor is needed"});
  p_.gradients.grad_out = &p_.grad_out.dl;
  p_.gradients.dq = p_.gradients.dk = p_.gradients.dv = nullptr;
  expect_prepare({"gradients asks for none; at least one of dq, dk, dv and captures is needed"});
}

TEST_F(BackwardErrors, Device) {
  for (const auto& [tensor, name] : {std::pair(&p_.grad_out, "grad_out"), std::pair(&p_.grad_lse, "grad_lse"),
                                     std::pair(&p_.dq, "dq"), std::pair(&p_.dk, "dk"), std::pair(&p_.dv, "dv")}) {
    tensor->dl.device = {kDLCUDA, 0};
    expect_prepare({name, " is on CUDA device 0 and q on the CPU; all tensors of a call are on one device"});
    tensor->dl.device = {kDLCPU, 0};
  }
  // A captured scalar of a CUDA call may stay on the CPU; its gradient may not.
  float slope = 1, gradient = NAN;
  p_.attention.score_mod = "score * slope";
  p_.capture("slope", &slope, {});
  p_.gradient("slope", &gradient, {});
  for (Tensor* tensor : {&p_.q, &p_.k, &p_.v, &p_.o, &p_.lse, &p_.grad_out, &p_.grad_lse, &p_.dq, &p_.dk, &p_.dv}) {
    tensor->dl.device = {kDLCUDA, 0};
  }
  expect_prepare(
      {"the gradient of slope is on the CPU and q on CUDA device 0; all tensors of a call are on one device"});
  EXPECT_THAT(attnjit_last_error(), testing::Not(HasSubstr("scalar")));
}

TEST_F(BackwardErrors, RankDtypeShapeAndStrides) {
  p_.grad_out.shape = {2, 40, 24};
  p_.grad_out.sync();
  expect_prepare({"grad_out has 3 dimensions; it needs 4: (batch, heads, seqlen_q, head_dim_v)"});
  p_.grad_out.shape = {2, 4, 40, 16};
  p_.grad_out.sync();
  expect_prepare({"grad_out has shape (2, 4, 40, 16)", "(batch, heads, seqlen_q, head_dim_v) = (2, 4, 40, 24)"});
  p_.grad_out.shape[3] = 24;
  p_.grad_out.dl.dtype = {kDLFloat, 16, 1};
  expect_prepare({"grad_out has dtype float16; it needs q's, float32"});
  p_.grad_out.dl.dtype = kF32;
  p_.grad_out.strides = {3840, 960, 24, 2};
  p_.grad_out.sync();
  expect_prepare({"grad_out has strides (3840, 960, 24, 2); the innermost one must be 1"});
  p_.grad_out.strides.clear();
  p_.grad_out.sync();

  p_.grad_lse.dl.dtype = {kDLBfloat, 16, 1};
  expect_prepare({"grad_lse has dtype bfloat16; allowed: float32"});
  p_.grad_lse.dl.dtype = kF32;
  p_.grad_lse.shape[2] = 41;
  expect_prepare({"grad_lse has shape (2, 4, 41); it needs (batch, heads, seqlen_q) = (2, 4, 40) from q"});
  p_.grad_lse.shape[2] = 40;

  p_.dq.shape[3] = 24;
  expect_prepare({"dq has shape (2, 4, 40, 24); it needs (batch, heads, sequence, head_dim) = (2, 4, 40, 16), q's"});
  p_.dq.shape[3] = 16;
  p_.dk.shape[1] = 4;
  expect_prepare({"dk has shape (2, 4, 50, 16)", " = (2, 2, 50, 16), k's"});
  p_.dk.shape[1] = 2;
  p_.dv.shape[3] = 16;
  expect_prepare({"dv has shape (2, 2, 50, 16)", " = (2, 2, 50, 24), v's"});
  p_.dv.shape[3] = 24;
  p_.dv.dl.dtype = {kDLBfloat, 16, 1};
  expect_prepare({"dv has dtype bfloat16; it needs q's, float32"});
  p_.dv.dl.dtype = kF32;
  p_.dk.strides = {1600, 800, 1, 50};
  p_.dk.sync();
  expect_prepare({"dk has strides (1600, 800, 1, 50); the innermost one must be 1"});
  p_.dk.strides = {0, 800, 16, 1};
  p_.dk.sync();
  expect_prepare({"dk has shape (2, 2, 50, 16) and strides (0, 800, 16, 1): its elements overlap"});
}

TEST_F(BackwardErrors, Flags) {
  for (const auto& [flag, name] : {std::pair(&p_.gradients.deterministic, "deterministic"),
                                   std::pair(&p_.gradients.partial_keys, "partial_keys")}) {
    for (const int bad : {-1, 2}) {
      *flag = bad;
      expect_prepare({"gradients.", name, " is ", "; allowed: 0 and 1"});
    }
    *flag = 0;
  }
}

TEST_F(BackwardErrors, CapturedGradients) {
  float table[8] = {}, slope = 1, gradient[8] = {};
  std::int32_t ids[4] = {};
  p_.attention.score_mod = "score * slope + table[h] + ids[h]";
  p_.capture("table", table, {4});
  p_.capture("ids", ids, {4}, kI32);
  p_.capture("slope", &slope, {});
  Tensor& tensor = p_.gradient("tabel", gradient, {4});
  expect_prepare({"gradients.captures has 'tabel', which captures lacks; allowed: slope, table"});
  p_.wanted[0].name = "ids";
  expect_prepare({"gradients.captures has 'ids', which is captured as int32; allowed, of float32, float16, bfloat16: ",
                  "slope, table"});
  p_.wanted[0].name = nullptr;
  expect_prepare({"gradients.captures[0].name is NULL"});
  p_.wanted[0].name = "table";
  p_.wanted[0].tensor = nullptr;
  expect_prepare({"the gradient of table is NULL; a tensor is needed"});
  p_.wanted[0].tensor = &tensor.dl;
  tensor.shape = {2, 2};
  tensor.sync();
  expect_prepare({"the gradient of table has shape (2, 2); it needs the captured tensor's, (4,)"});
  tensor.shape = {3};
  tensor.sync();
  expect_prepare({"the gradient of table has shape (3,); it needs the captured tensor's, (4,)"});
  tensor.shape = {4};
  tensor.dl.dtype = {kDLBfloat, 16, 1};
  expect_prepare({"the gradient of table has dtype bfloat16; it needs the captured tensor's, float32"});
  tensor.dl.dtype = kI32;
  expect_prepare({"the gradient of table has dtype int32; allowed: float32, float16, bfloat16"});
  tensor.dl.dtype = kF32;
  tensor.strides = {0};
  tensor.sync();
  expect_prepare({"the gradient of table has shape (4,) and strides (0,): its elements overlap"});
  tensor.strides = {-1};
  expect_prepare({"the gradient of table has strides (-1,); a negative one is not allowed"});
  tensor.strides.clear();
  tensor.sync();
  p_.gradient("table", gradient, {4});
  expect_prepare({"gradients.captures has 'table' twice"});
  p_.wanted[1].name = "slope";
  expect_prepare({"the gradient of slope has shape (4,); it needs the captured tensor's, ()"});
  p_.gradients.num_captures = 17;
  expect_prepare({"gradients.num_captures is 17; allowed: 0 to 16"});
  p_.gradients.captures = nullptr;
  p_.gradients.num_captures = 1;
  expect_prepare({"gradients.captures is NULL, but gradients.num_captures is 1"});

  GradientProblem none;
  none.gradient("table", gradient, {4});
  attnjit_plan* plan = nullptr;
  EXPECT_EQ(attnjit_prepare_backward(context_.get(), &none.attention, &none.gradients, nullptr, &plan),
            ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "gradients.captures has 'table', which captures lacks; allowed: none");
}

TEST_F(BackwardErrors, LongNamesAreShortened) {
  const std::string name(60'000, 'x'), start = name.substr(0, 57) + "...", text = "score + " + name + "[h]";
  float table[4] = {}, gradient[4] = {};
  p_.attention.score_mod = text.c_str();
  p_.capture(name.c_str(), table, {4});
  Tensor& tensor = p_.gradient(name.c_str(), gradient, {3});
  const auto expect_short = [&](const std::string& fragment) {
    EXPECT_THAT(attnjit_last_error(), HasSubstr(fragment));
    EXPECT_LT(std::strlen(attnjit_last_error()), 300U);
  };
  expect_prepare({"the gradient of "});
  expect_short("the gradient of " + start + " has shape (3,)");
  tensor.shape = {4};
  tensor.dl.data = p_.dq_data.data();
  expect_call({"shares memory"});
  expect_short("the gradient of " + start + " shares memory with dq");
}

TEST_F(BackwardErrors, Data) {
  for (const auto& [tensor, name] : {std::pair(&p_.lse, "lse"), std::pair(&p_.o, "o"),
                                     std::pair(&p_.grad_out, "grad_out"), std::pair(&p_.grad_lse, "grad_lse"),
                                     std::pair(&p_.dq, "dq"), std::pair(&p_.dk, "dk"), std::pair(&p_.dv, "dv")}) {
    void* const data = std::exchange(tensor->dl.data, nullptr);
    expect_call({name, " has a NULL data pointer"});
    tensor->dl.data = data;
    tensor->dl.byte_offset = 2;
    expect_call({name, " has data at 0x", "byte_offset included", "multiple of 4 bytes"});
    tensor->dl.byte_offset = 0;
  }
  float table[4] = {};
  p_.attention.score_mod = "score + table[h]";
  p_.capture("table", table, {4});
  p_.gradient("table", nullptr, {4});
  expect_call({"the gradient of table has a NULL data pointer"});
}

TEST_F(BackwardErrors, Overlap) {
  float table[4] = {}, gradient[4] = {};
  p_.attention.score_mod = "score + table[h]";
  p_.capture("table", table, {4});
  Tensor& of_table = p_.gradient("table", gradient, {4});
  // Each output at the place of each input, and of each other output, in memory that nothing else is near.
  std::vector<float> place(10'000);
  const struct Named {
    Tensor& tensor;
    const char* name;
  } outputs[] = {{p_.dq, "dq"}, {p_.dk, "dk"}, {p_.dv, "dv"}, {of_table, "the gradient of table"}},
    inputs[] = {{p_.q, "q"},
                {p_.k, "k"},
                {p_.v, "v"},
                {p_.o, "o"},
                {p_.lse, "lse"},
                {p_.grad_out, "grad_out"},
                {p_.grad_lse, "grad_lse"},
                {*p_.captured[0], "table"}};
  const auto expect_overlap = [&](const Named& output, const Named& other) {
    void* const data[] = {output.tensor.dl.data, other.tensor.dl.data};
    output.tensor.dl.data = other.tensor.dl.data = place.data();
    expect_call({output.name, " shares memory with ", other.name, "; an output must lie apart"});
    output.tensor.dl.data = data[0];
    other.tensor.dl.data = data[1];
  };
  for (const Named& output : outputs) {
    for (const Named& input : inputs) expect_overlap(output, input);
    for (const Named* other = outputs; other != &output; ++other) expect_overlap(output, *other);
  }
}

TEST_F(BackwardErrors, WorkspaceAndStream) {
  p_.remove_keys();
  const PlanPtr plan = prepare_backward(context_, p_);
  ASSERT_TRUE(plan);
  EXPECT_EQ(attnjit_run_backward(plan.get(), &p_.attention, &p_.gradients, nullptr, 0, this), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "stream is not NULL; a CPU plan runs on the calling thread");
}

TEST_F(BackwardErrors, PlanOfTheOtherKind) {
  p_.remove_keys();
  const PlanPtr forward = prepare(context_, p_.attention);
  const PlanPtr backward = prepare_backward(context_, p_);
  ASSERT_TRUE(forward && backward);
  EXPECT_EQ(attnjit_run(backward.get(), &p_.attention, nullptr, 0, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "plan is a backward's; attnjit_run takes one of attnjit_prepare");
  EXPECT_EQ(attnjit_run_backward(forward.get(), &p_.attention, &p_.gradients, nullptr, 0, nullptr),
            ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "plan is a forward's; attnjit_run_backward takes one of attnjit_prepare_backward");
}

TEST_F(BackwardErrors, RunOfAnotherProblem) {
  p_.remove_keys();
  float table[4] = {}, slope = 0, gradient[4] = {};
  p_.attention.score_mod = "score * slope + table[h]";
  p_.capture("table", table, {4});
  p_.capture("slope", &slope, {});
  p_.gradient("table", gradient, {4});
  for (const auto& [field, name] :
       {std::pair(&p_.gradients.dq, "dq"), std::pair(&p_.gradients.dk, "dk"), std::pair(&p_.gradients.dv, "dv")}) {
    DLTensor* const given = *field;
    expect_run([&] { *field = nullptr; },
               {name, " was given when the plan was prepared and is NULL now; prepare again"});
    expect_run([&] { *field = given; }, {name, " was NULL when the plan was prepared and is given now; prepare again"});
  }
  expect_run([&] { p_.gradients.grad_lse = nullptr; },
             {"grad_lse was given when the plan was prepared and is NULL now"});
  expect_run([&] { p_.gradients.deterministic = 1; },
             {"gradients.deterministic was 0 when the plan was prepared and is 1 now; prepare again"});
  expect_run([&] { p_.gradients.partial_keys = 1; },
             {"gradients.partial_keys was 0 when the plan was prepared and is 1 now; prepare again"});
  expect_run([&] { p_.gradients.num_captures = 0; },
             {"the gradient of table was wanted when the plan was prepared and is not wanted now; prepare again"});
  float of_slope = 0;
  expect_run([&] { p_.gradient("slope", &of_slope, {}); },
             {"the gradient of slope was not wanted when the plan was prepared and is wanted now"});
  expect_run([&] { p_.attention.score_mod = "score * slope - table[h]"; }, {"score_mod was "});
  // What a forward has beyond a backward does not tell plans apart.
  const PlanPtr plan = prepare_backward(context_, p_);
  p_.attention.row_max = nullptr;
  p_.attention.max_autotune = 1;
  EXPECT_EQ(attnjit_run_backward(plan.get(), &p_.attention, &p_.gradients, nullptr, 0, nullptr), ATTNJIT_OK)
      << attnjit_last_error();
}

TEST(ErrorNames, StatusAndBackend) {
  EXPECT_STREQ(attnjit_status_name(ATTNJIT_OK), "ok");
  EXPECT_STREQ(attnjit_status_name(ATTNJIT_UNSUPPORTED), "unsupported");
  EXPECT_STREQ(attnjit_status_name(ATTNJIT_NOT_PREPARED), "not prepared");
  EXPECT_STREQ(attnjit_status_name(std::bit_cast<attnjit_status>(99)), "unknown status");
  EXPECT_STREQ(attnjit_backend_name(ATTNJIT_BACKEND_CPU), "cpu");
  EXPECT_STREQ(attnjit_backend_name(ATTNJIT_BACKEND_SM80), "sm80");
  EXPECT_STREQ(attnjit_backend_name(ATTNJIT_BACKEND_SM90), "sm90");
  EXPECT_STREQ(attnjit_backend_name(std::bit_cast<attnjit_backend>(99)), "unknown backend");
}

// Sets a variable for one scope.
class ScopedVariable {
 public:
  ScopedVariable(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~ScopedVariable() { unsetenv(name_); }

 private:
  const char* name_;
};

TEST(ErrorEnvironment, BadValues) {
  const struct {
    const char* name;
    const char* value;
    const char* message;
  } cases[] = {
      {"ATTNJIT_LOG", "loud", "ATTNJIT_LOG is 'loud'; allowed: off, error, warn, info, debug, trace"},
      {"ATTNJIT_DUMP", "mlir,sass",
       "ATTNJIT_DUMP is 'mlir,sass'; allowed: a comma-separated list of mlir, llvm, asm, cuda, ptx, cubin"},
      {"ATTNJIT_BACKENDS", "cpu,gpu",
       "ATTNJIT_BACKENDS is 'cpu,gpu'; allowed: a comma-separated list of sm90, sm80, math, cpu"},
      {"ATTNJIT_NUM_THREADS", "0", "ATTNJIT_NUM_THREADS is '0'; allowed: a whole number from 1 to 1024"},
      {"ATTNJIT_NUM_THREADS", "2x", "ATTNJIT_NUM_THREADS is '2x'; allowed: a whole number from 1 to 1024"},
      {"ATTNJIT_CUDA_MAX_SMS", "0", "ATTNJIT_CUDA_MAX_SMS is '0'; allowed: a whole number from 1 on"},
      {"ATTNJIT_CUDA_MAX_SMS", "-3", "ATTNJIT_CUDA_MAX_SMS is '-3'; allowed: a whole number from 1 on"},
      {"ATTNJIT_CPU_ISA", "neon", "ATTNJIT_CPU_ISA is 'neon'; allowed: sse2, avx2, avx512, avx512bf16"},
  };
  for (const auto& c : cases) {
    const ScopedVariable variable(c.name, c.value);
    attnjit_context* context = nullptr;
    EXPECT_EQ(attnjit_context_create(nullptr, &context), ATTNJIT_ENVIRONMENT);
    EXPECT_STREQ(attnjit_last_error(), c.message);
  }
}

}  // namespace
}  // namespace attnjit::test
