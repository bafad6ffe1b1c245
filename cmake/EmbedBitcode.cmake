# Script: writes a C++ file with the bytes of some files and a function that returns one of them by number.
# cmake -DOUTPUT=out.cpp -DFUNCTION=tile_bitcode -DFILES=a.bc,b.bc,... -P EmbedBitcode.cmake
# FILES are in the order of the number; one file may stand several times.
string(REPLACE "," ";" FILES "${FILES}")
set(text "// Generated.\n#include \"kernels_templates/cpu/embedded.h\"\n\nnamespace attnjit::cpu {\nnamespace {\n\n")
set(rows "")
set(seen "")
foreach(file ${FILES})
  list(FIND seen ${file} index)
  if(index EQUAL -1)
    list(LENGTH seen index)
    list(APPEND seen ${file})
    file(READ ${file} bytes HEX)
    string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${bytes}")
    string(APPEND text "alignas(16) constexpr unsigned char kBytes${index}[] = {${bytes}};\n")
  endif()
  string(APPEND rows "  {kBytes${index}, sizeof(kBytes${index})},\n")
endforeach()
string(APPEND text "constexpr EmbeddedBitcode kTable[] = {\n${rows}};\n\n}  // namespace\n\n"
  "EmbeddedBitcode ${FUNCTION}(int isa) { return kTable[isa]; }\n\n}  // namespace attnjit::cpu\n")
file(WRITE ${OUTPUT} "${text}")
