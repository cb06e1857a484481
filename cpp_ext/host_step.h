// The integrator step on the CPU: whole tensors, vectorised and threaded. Sizes and types are checked by bindings.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace elf {

enum class NetworkType { float32, float16, bfloat16 };

// A network tensor: (rows, batch, length, width), contiguous; null where there is none.
struct NetworkTensor {
  void* data = nullptr;
  NetworkType type = NetworkType::float32;
  int rows = 0;
};

// One call of elf_rt.sampling.integrator.step. Arrays are contiguous; null where absent.
struct Step {
  int64_t batch, length, width;
  float *z, *x_last;                  // (batch, length, width)
  NetworkTensor x_rows, next_z, next_x_prev;
  const float* weights;               // (x_rows.rows, batch)
  const float* coef;                  // (batch, 5)
  const float* noise;                 // (batch, length, width), or
  const uint64_t* seeds;              // (batch), to draw it, or neither
  uint32_t noise_index;
  const float* source;                // (batch, length, width)
  const uint8_t* mask;                // (batch, length)
  const bool *sees_source, *sees_prev;  // of each row of next_z and next_x_prev
};

void run_step(const Step& step);

// How many threads run_step may use; at least 1.
void set_num_threads(int count);

}  // namespace elf
