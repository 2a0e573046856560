// The instruction sets for which each CPU kernel is compiled, and run-time dispatch between them.
//
// A file csrc/<op>/cpu.cpp is compiled once per instruction set, with RECA_ISA defined as its name. It has this form:
//
//     #include "op.h"                            // declares  namespace reca { void f(const Args&, Launch); }
//     namespace reca::RECA_ISA {
//     void f(const Args& args, Launch on) { ... }
//     }
//     RECA_DISPATCH(f, (const Args& args, Launch on), (args, on))
//
// Such a file must not instantiate templates or inline functions that other files instantiate too (std::vector, …). The
// linker keeps one copy of those, possibly the AVX-512 one, which older processors would then run. Helpers belong in an
// anonymous namespace or in namespace reca::RECA_ISA.
#pragma once

#ifndef RECA_ISA
#define RECA_ISA baseline
#endif

namespace reca {

enum class Isa { baseline, avx2, avx512 };

Isa best_isa();          // the best one that this processor supports
Isa current_isa();       // the one in use: the best one, unless changed by set_isa
void set_isa(Isa isa);   // isa must not exceed best_isa()

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
