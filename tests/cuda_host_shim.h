// Just enough of CUDA to compile cpp_ext/integrator.cu for the host and run its kernels one thread after the other.
// Only for kernels without __syncthreads or atomics: the order of threads must not matter.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Dim3 {
  uint32_t x, y, z;
};
static thread_local Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}

template <typename... A>
void launch(void (*kernel)(A...), const uint32_t* grid, const uint32_t* block, void** arguments) {
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block[0], block[1], block[2]};
  for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x)
        for (threadIdx.z = 0; threadIdx.z < block[2]; ++threadIdx.z)
          for (threadIdx.y = 0; threadIdx.y < block[1]; ++threadIdx.y)
            for (threadIdx.x = 0; threadIdx.x < block[0]; ++threadIdx.x)
              call(kernel, arguments, std::index_sequence_for<A...>{});
}

// Sizes in bytes of a kernel's parameters; returns how many there are.
template <typename... A>
int parameters(void (*)(A...), size_t* sizes) {
  const size_t all[] = {sizeof(A)...};
  for (size_t i = 0; i < sizeof...(A); ++i) sizes[i] = all[i];
  return sizeof...(A);
}

}  // namespace emulator

#define EMULATE(kernel)                                                                                       \
  extern "C" void launch_##kernel(const uint32_t* grid, const uint32_t* block, void** arguments) {            \
    emulator::launch(kernel, grid, block, arguments);                                                         \
  }                                                                                                           \
  extern "C" int parameters_##kernel(size_t* sizes) { return emulator::parameters(kernel, sizes); }
