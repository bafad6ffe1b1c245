# Script: writes a C++ file with the text of some files and attnjit::cuda::template_text, which returns one by its path.
# cmake -DOUTPUT=out.cpp -DDIRECTORY=kernels_templates -DFILES=cuda/params.h,... -P EmbedText.cmake
# FILES are below DIRECTORY. `#pragma once` is left out: NVRTC sees each text once, in the middle of one file.
string(REPLACE "," ";" FILES "${FILES}")
set(text "// Generated.\n#include \"kernels_templates/cuda/embedded.h\"\n\n#include <cstring>\n\nnamespace attnjit::cuda {\nnamespace {\n\n")
string(APPEND text "struct Row {\n  const char* path;\n  EmbeddedText text;\n};\n\n")
set(rows "")
set(number 0)
foreach(file ${FILES})
  # As bytes: CMake's strings would lose semicolons and brackets, and compilers limit literals.
  file(READ ${DIRECTORY}/${file} bytes HEX)
  string(HEX "#pragma once\n\n" pragma)
  string(REPLACE "${pragma}" "" bytes "${bytes}")
  string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${bytes}")
  string(APPEND text "constexpr char kText${number}[] = {${bytes}};\n")
  string(APPEND rows "    {\"${file}\", {kText${number}, sizeof(kText${number})}},\n")
  math(EXPR number "${number} + 1")
endforeach()
string(APPEND text "constexpr Row kTable[] = {\n${rows}};\n\n}  // namespace\n\n"
  "EmbeddedText template_text(const char* path) {\n"
  "  for (const Row& row : kTable)\n"
  "    if (std::strcmp(row.path, path) == 0) return row.text;\n"
  "  return {};\n}\n\n}  // namespace attnjit::cuda\n")
file(WRITE ${OUTPUT} "${text}")
