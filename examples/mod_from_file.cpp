// A mod as data: the expression comes from a text file; its mistakes are reported with line, column and a caret.
#include <attnjit/attnjit.hpp>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "common.h"

int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: %s FILE.mod\n", argv[0]), 1;
  std::ifstream file(argv[1]);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  if (!file) return std::fprintf(stderr, "cannot read %s\n", argv[1]), 1;

  const std::vector<float> q = random_values(4 * 128 * 32, 1);
  const std::vector<float> k = random_values(4 * 128 * 32, 2);
  const std::vector<float> v = random_values(4 * 128 * 32, 3);
  std::vector<float> o(q.size()), eager(q.size());

  auto context = attnjit::Context::create();
  if (!context) return std::fprintf(stderr, "%s\n", context.status().message().c_str()), 1;

  attnjit::Attention attention{.q = {q.data(), {1, 4, 128, 32}},
                               .k = {k.data(), {1, 4, 128, 32}},
                               .v = {v.data(), {1, 4, 128, 32}},
                               .o = {o.data(), {1, 4, 128, 32}},
                               .score_mod = text};
  attnjit::Status status = context->forward(attention);
  attention.o = {eager.data(), {1, 4, 128, 32}};
  attention.backend = attnjit::Backend::kMath;
  if (status) status = context->forward(attention);
  if (!status) return std::fprintf(stderr, "%s\n", status.message().c_str()), 1;

  const float difference = largest_difference(o, eager);
  std::printf("%slargest difference between fused and eager: %.2g\n", text.c_str(), difference);
  return difference < 1e-4f ? 0 : 1;
}
