// What the module was built from.
#pragma once

namespace reca {

const char* sources();  // the SHA-256 that CMakeLists.txt computes of csrc and itself

}  // namespace reca
