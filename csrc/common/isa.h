// The instruction sets that each CPU kernel is compiled for, and the choice between them at run time.
//
// A file csrc/<op>/cpu.cpp is compiled once per instruction set, with RECA_ISA its name. It looks like this:
//
//     #include "op.h"                            // declares  namespace reca { void f(const Args&, Launch); }
//     namespace reca::RECA_ISA {
//     void f(const Args& args, Launch on) { ... }
//     }
//     RECA_DISPATCH(f, (const Args& args, Launch on), (args, on))
//
// Such a file must not instantiate templates or inline functions that other files instantiate too (std::vector, …):
// the linker keeps one copy of those, perhaps the AVX-512 one, and older processors would run it. Helpers go into an
// anonymous namespace, or into namespace reca::RECA_ISA.
#pragma once

#ifndef RECA_ISA
#define RECA_ISA baseline
#endif

namespace reca {

enum class Isa { baseline, avx2, avx512 };

Isa best_isa();          // what this processor can run
Isa current_isa();       // what the kernels use: the best one, unless set_isa said otherwise
void set_isa(Isa isa);   // must not be above best_isa()

}  // namespace reca

#if defined(RECA_ISA_baseline) && defined(__x86_64__)
#define RECA_DISPATCH(name, parameters, arguments)     \
  namespace reca::avx2 {                               \
  void name parameters;                                \
  }                                                    \
  namespace reca::avx512 {                             \
  void name parameters;                                \
  }                                                    \
  namespace reca {                                     \
  void name parameters {                               \
    switch (current_isa()) {                           \
      case Isa::avx512: return avx512::name arguments; \
      case Isa::avx2: return avx2::name arguments;     \
      default: return baseline::name arguments;        \
    }                                                  \
  }                                                    \
  }
#elif defined(RECA_ISA_baseline)
#define RECA_DISPATCH(name, parameters, arguments)          \
  namespace reca {                                          \
  void name parameters { return baseline::name arguments; } \
  }
#else
#define RECA_DISPATCH(name, parameters, arguments)
#endif
