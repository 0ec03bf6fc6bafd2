// CUDA enough to run a kernel on a CPU: a block is one fiber per thread, and a barrier passes the turn to the next. Blocks run one after the other.
//
// For the tests of csrc/cuda: what runs is its code, not its timing, so a missing barrier may go unseen; ends of blocks and arithmetic do not.
#pragma once

#include <setjmp.h>
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
struct uint4 {
  unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  jmp_buf place;  // a context starts a fiber once; jumps, which ask the system for nothing, are far faster from then on
  bool begun = false, done;
};
inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline unsigned turn, alive, arrived, generation;
inline const std::function<void()>* kernel;

inline void leave_barrier() {
  if (arrived == alive) arrived = 0, generation++;
}

inline void pass_turn() {
  if (!_setjmp(fibers[turn].place)) _longjmp(scheduler, 1);
}

inline void run_thread() {
  while (true) {
    (*kernel)();
    fibers[turn].done = true;
    alive--;
    leave_barrier();
    pass_turn();  // until the next block
  }
}

inline void take_turn() {
  if (_setjmp(scheduler)) return;
  Fiber& fiber = fibers[turn];
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {.ss_sp = fiber.stack.data(), .ss_flags = 0, .ss_size = fiber.stack.size()};
  makecontext(&fiber.context, run_thread, 0);
  setcontext(&fiber.context);
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& f) {
  kernel = &f, gridDim = grid, blockDim = block;
  if (fibers.size() < block.x) fibers.resize(block.x);
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; i++) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    alive = block.x, arrived = 0;
    for (unsigned t = 0; t < block.x; t++) fibers[t].done = false;
    while (alive)
      for (turn = 0; turn < block.x; turn++)
        if (!fibers[turn].done) threadIdx = {turn}, take_turn();
  }
}

}  // namespace emulate

// A barrier waits for all threads that have not ended.
inline void __syncthreads() {
  using namespace emulate;
  const unsigned mine = generation;
  arrived++;
  leave_barrier();
  while (generation == mine) pass_turn();
}
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long amount) { return (*at += amount) - amount; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline uint32_t __float_as_uint(float a) { return std::bit_cast<uint32_t>(a); }
inline float __uint_as_float(uint32_t a) { return std::bit_cast<float>(a); }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __popcll(unsigned long long a) { return std::popcount(a); }
inline int __clzll(unsigned long long a) { return std::countl_zero(a); }
inline void atomicAnd(unsigned long long* at, unsigned long long mask) { *at &= mask; }
inline void atomicMax(int* at, int value) { *at = value > *at ? value : *at; }
