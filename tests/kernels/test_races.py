"""The emulator reports data races: kernels that have one end their process, kernels that have none do not."""

import subprocess
from pathlib import Path

import pytest

from tests import compiled
from tests.kernels import emulated

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))

PROGRAM = """
#include "common/cuda.cuh"
using namespace reca::cuda;

// Each thread passes its number on to its neighbour, through shared or through global memory.
__global__ void pass_on(float* out, bool barrier, bool shared) {
  __shared__ float numbers[64];
  float* const place = shared ? numbers : out + 64 * blockIdx.x;
  place[threadIdx.x] = float(threadIdx.x);
  if (barrier) __syncthreads();
  const float got = place[(threadIdx.x + 1) % 64];
  if (barrier) __syncthreads();
  place[threadIdx.x] = got;
}
__global__ void shuffle(float* out) {
  __shared__ float numbers[32];
  numbers[threadIdx.x] = 1;
  const float mine = __shfl_xor_sync(all_lanes, 1.0f, 1);  // no order of memory
  out[threadIdx.x] = numbers[31 - threadIdx.x] + mine;
}
__global__ void sums(float* out) {
  const float one = block_sum<64>(1.0f);
  __syncthreads();
  const float two = block_sum<64>(2.0f);
  if (threadIdx.x == 0) out[blockIdx.x] = one + two;
}
__global__ void sums_without_barrier(float* out) {
  const float one = block_sum<64>(1.0f), two = block_sum<64>(2.0f);
  if (threadIdx.x == 0) out[blockIdx.x] = one + two;
}
__global__ void write_at(float* out, int stride) {  // by the first thread of each block
  if (threadIdx.x == 0) out[stride * blockIdx.x] = 1;
}
__global__ void read_other_block(float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = blockIdx.x ? 0 : out[1];
}
__global__ void halves(float* out) {  // neighbours in one 32-bit word
  reinterpret_cast<bf16*>(out)[threadIdx.x] = {};
}
__global__ void read_unwritten(float* out) {
  __shared__ float numbers[64];
  if (threadIdx.x < 63) numbers[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x];
}
__global__ void copy(float* out, bool wait) {
  static_cast<float*>(dynamic_shared())[4 * threadIdx.x] = 0;
  copy_async(static_cast<uint4*>(dynamic_shared()) + threadIdx.x, out + 256 + 4 * threadIdx.x);
  if (wait) wait_for_copies();
  __syncthreads();
  if (!wait) wait_for_copies();
  out[64 * blockIdx.x + threadIdx.x] = static_cast<float*>(dynamic_shared())[255 - 4 * threadIdx.x];
}

int main(int, char** asked) {
  std::vector<float> out(1024);
  const std::string name = asked[1];
  const auto run = [&](const char* one, auto kernel, int64_t blocks, int threads, auto... args) {
    if (name == one) launch("test", {}, kernel, blocks, threads, 1024, out.data(), args...), std::puts("done");
  };
  run("shared", pass_on, 3, 64, true, true);
  run("global", pass_on, 3, 64, true, false);
  run("sums", sums, 3, 64);
  run("apart", write_at, 3, 64, 1);
  run("halves", halves, 1, 64);
  run("copy", copy, 1, 64, true);
  run("shared, no barrier", pass_on, 1, 64, false, true);
  run("global, no barrier", pass_on, 1, 64, false, false);
  run("shuffle", shuffle, 1, 32);
  run("sums, no barrier", sums_without_barrier, 1, 64);
  run("one place", write_at, 2, 64, 0);
  run("another block's", read_other_block, 2, 64);
  run("halves of two blocks", halves, 2, 64);
  run("unwritten", read_unwritten, 1, 64);
  run("copy, awaited late", copy, 2, 64, false);
}
"""
RIGHT = ("shared", "global", "sums", "apart", "halves", "copy")
WRONG = {
    "shared, no barrier": "shared memory is read that was not written",
    "global, no barrier": "a write races with a read",
    "shuffle": "a read races with a write",
    "sums, no barrier": "a write races with a read",
    "one place": "two writes race",
    "another block's": "a write races with a read",
    "halves of two blocks": "two writes race",
    "unwritten": "shared memory is read that was not written",
    "copy, awaited late": "a write races with a read",
}


@pytest.fixture(scope="module")
def program() -> Path:
    flags = [*emulated.FLAGS, *emulated.RACES, f"-I{Path(__file__).parent / 'emulator'}", f"-I{emulated.ROOT / 'csrc'}"]

    def compile_to(made: Path) -> None:
        source, compiled_source = made.with_name("program.cpp"), str(made.with_name("program.o"))
        source.write_text(PROGRAM)
        for command in (
            ["g++", "-O1", *flags, "-c", str(source), "-o", compiled_source],
            ["g++", compiled_source, "-o", str(made)],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

    parts = [Path(__file__), *emulated.sources(), *flags, compiled.version("g++")]
    return compiled.once("races", parts, compile_to)


@pytest.mark.parametrize("kernel", RIGHT)
def test_kernels_without_a_race_run(program, kernel):
    done = subprocess.run([program, kernel], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("kernel", WRONG)
def test_races_end_the_process(program, kernel):
    done = subprocess.run([program, kernel], capture_output=True, text=True)
    assert done.returncode < 0 and done.stdout == ""
    assert f"CUDA emulator: {WRONG[kernel]}" in done.stderr
