#include "common/sources.h"

namespace reca {

const char* sources() { return RECA_SOURCES; }

}  // namespace reca
