// Data races of kernels in the emulator, found where a .cu file is compiled with -fsanitize=thread: GCC then calls a
// function at every memory access, and these functions are here. (Its own library, which knows the system's threads
// only, is not linked.)
//
// Two accesses to the same two bytes, one of them a write, race if different blocks of a launch make them, or different
// threads of a block without a __syncthreads() in between. Shuffles and votes do not order memory. A read of shared
// memory that no thread of the block has written is an error, too. Atomic operations are not looked at.
#pragma once

namespace emulator {

struct Access {
  int64_t block = -1;  // none yet
  int thread;
  uint64_t barriers;  // that the thread had passed
};

// What has been done to two bytes.
struct History {
  Access write, read, other_read;  // the newest; other_read is by another thread than read
  int64_t reading_block = -1;
  bool read_by_blocks = false;  // by several
};

using Histories = std::unordered_map<uintptr_t, History>;  // by address / 2
inline Histories of_global, of_shared;

extern "C" __attribute__((visibility("hidden"))) char __bss_start[], _end[];  // of the module's static variables

inline bool within(const void* p, const void* begin, size_t bytes) {
  return std::less_equal<>()(begin, p) && std::less<>()(p, static_cast<const char*>(begin) + bytes);
}

inline bool is_shared(const void* p) {
  return within(p, __bss_start, _end - __bss_start) || within(p, dynamic_shared.data(), dynamic_shared.size());
}

// Tells whether p is in a variable of the emulator, or in the stack of the running thread.
inline bool is_private(const void* p) {
  const auto in = [p](const auto&... variables) { return (within(p, &variables, sizeof variables) || ...); };
  return within(p, threads[current].stack.get(), stack_bytes) ||
         in(threadIdx, blockIdx, blockDim, gridDim, dynamic_shared, in_kernel, current, threads, body);
}

[[noreturn]] inline void report(const char* what, const Access& a, const Access& b) {
  std::fprintf(stderr, "CUDA emulator: %s: thread %d of block %d and thread %d of block %d, after %d and %d barriers\n",
               what, a.thread, int(a.block), b.thread, int(b.block), int(a.barriers), int(b.barriers));
  std::abort();
}

inline void order(const Access& before, const Access& now, const char* what) {
  if (before.block < 0 || (before.block == now.block && before.thread == now.thread)) return;
  if (before.block != now.block || now.barriers <= before.barriers) report(what, before, now);
}

inline void forget_launch() { of_global.clear(); }
inline void forget_block() { of_shared.clear(); }

inline void accessed(History& history, bool shared, bool writes) {
  const Access now = {blockIdx.x, current, threads[current].barriers};
  order(history.write, now, writes ? "two writes race" : "a read races with a write");
  if (writes) {
    order(history.read, now, "a write races with a read");
    order(history.other_read, now, "a write races with a read");
    if (history.read_by_blocks || (history.reading_block >= 0 && history.reading_block != now.block)) {
      report("a write races with a read of another block", now, now);
    }
    history.write = now;
  } else {
    if (shared && history.write.block < 0) report("shared memory is read that was not written", now, now);
    if (history.read.block != now.block || history.read.thread != now.thread) history.other_read = history.read;
    history.read = now;
    history.read_by_blocks |= history.reading_block >= 0 && history.reading_block != now.block;
    history.reading_block = now.block;
  }
}

inline void accessed(const void* p, size_t bytes, bool writes) {
  if (is_private(p)) return;
  const bool shared = is_shared(p);
  Histories& histories = shared ? of_shared : of_global;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t i = at / 2; i <= (at + bytes - 1) / 2; ++i) accessed(histories[i], shared, writes);
}

}  // namespace emulator

#define RECA_ACCESS(name, bytes, writes)                                                \
  extern "C" __attribute__((used, no_sanitize("thread"))) inline void name(void* at) {   \
    if (!emulator::in_kernel) return;                                                   \
    emulator::in_kernel = false;                                                        \
    emulator::accessed(at, bytes, writes);                                              \
    emulator::in_kernel = true;                                                         \
  }
#define RECA_ACCESSES(bytes)                             \
  RECA_ACCESS(__tsan_read##bytes, bytes, false)          \
  RECA_ACCESS(__tsan_write##bytes, bytes, true)          \
  RECA_ACCESS(__tsan_unaligned_read##bytes, bytes, false) \
  RECA_ACCESS(__tsan_unaligned_write##bytes, bytes, true)
RECA_ACCESSES(1)
RECA_ACCESSES(2)
RECA_ACCESSES(4)
RECA_ACCESSES(8)
RECA_ACCESSES(16)

#define RECA_RANGE(name, writes)                                                                    \
  extern "C" __attribute__((used, no_sanitize("thread"))) inline void name(void* at, size_t bytes) { \
    if (!emulator::in_kernel || bytes == 0) return;                                                 \
    emulator::in_kernel = false;                                                                    \
    emulator::accessed(at, bytes, writes);                                                          \
    emulator::in_kernel = true;                                                                     \
  }
RECA_RANGE(__tsan_read_range, false)
RECA_RANGE(__tsan_write_range, true)

extern "C" __attribute__((used, no_sanitize("thread"))) inline void __tsan_init() {}
extern "C" __attribute__((used, no_sanitize("thread"))) inline void __tsan_func_entry(void*) {}
extern "C" __attribute__((used, no_sanitize("thread"))) inline void __tsan_func_exit() {}
