// The digest of the sources from which the module was built.
#pragma once

namespace reca {

const char* sources();  // SHA-256 of csrc and CMakeLists.txt, computed by CMakeLists.txt

}  // namespace reca
