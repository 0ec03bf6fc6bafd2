// CUDA enough to run a kernel on a CPU: a block is one fiber per thread, and a barrier passes the turn to the next. Blocks run one after the other.
//
// For the tests of csrc/cuda: what runs is its code, not its timing, so a missing barrier may go unseen; ends of blocks and arithmetic do not.
#pragma once

#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#define __global__
#define __launch_bounds__(threads)
#define __device__
#define __shared__ static
using cudaStream_t = void*;
inline int cudaGetLastError() { return 0; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = true;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned turn;
inline const std::function<void()>* kernel;

inline void run_thread() {
  (*kernel)();
  fibers[turn].done = true;
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& f) {
  kernel = &f, gridDim = grid, blockDim = block;
  if (fibers.size() < block.x) fibers.resize(block.x);
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; i++) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    for (unsigned t = 0; t < block.x; t++) {
      Fiber& fiber = fibers[t];
      getcontext(&fiber.context);
      fiber.context.uc_stack = {.ss_sp = fiber.stack.data(), .ss_flags = 0, .ss_size = fiber.stack.size()};
      fiber.context.uc_link = &scheduler;
      fiber.done = false;
      makecontext(&fiber.context, run_thread, 0);
    }
    for (bool more = true; more;) {
      more = false;
      for (turn = 0; turn < block.x; turn++) {
        if (fibers[turn].done) continue;
        threadIdx = {turn};
        swapcontext(&scheduler, &fibers[turn].context);
        more |= !fibers[turn].done;
      }
    }
  }
}

}  // namespace emulate

inline void __syncthreads() { swapcontext(&emulate::fibers[emulate::turn].context, &emulate::scheduler); }
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long amount) { return (*at += amount) - amount; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline uint32_t __float_as_uint(float a) { return std::bit_cast<uint32_t>(a); }
inline float __uint_as_float(uint32_t a) { return std::bit_cast<float>(a); }
