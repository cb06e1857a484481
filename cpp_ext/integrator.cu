// The integrator on the GPU: elf_rt/sampling/integrator.py's step over all slots of a call, as one kernel.
//
// What each text does in this pass (its coefficients, where its outputs are and its inputs go) is not in the arguments
// but in an array of SlotStep in device memory, so that one captured graph serves every text, step, sampler and guidance.
// An entry whose z is null does nothing: so a graph of R rows serves calls of fewer texts.
//
// Launch: grid (ceil(length * width / (4 * block)), entries, 1), four elements a thread: every access is 16 bytes wide
// where addresses and sizes allow it, and by element otherwise.
#include "integrator.h"

namespace elf {

constexpr int V = 4;  // consecutive elements of a thread

struct alignas(16) Pack {
  float v[V];
};

// V consecutive elements; `wide` is the same for all threads of an entry.
__device__ __forceinline__ void load(float (&out)[V], const float* from, bool wide, int count) {
  if (wide) {
    const Pack pack = *reinterpret_cast<const Pack*>(from);
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = pack.v[i];
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = i < count ? from[i] : 0.0f;
  }
}

__device__ __forceinline__ void store(float* to, const float (&values)[V], bool wide, int count) {
  if (wide) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < V; ++i) pack.v[i] = values[i];
    *reinterpret_cast<Pack*>(to) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < count) to[i] = values[i];
  }
}

__device__ __forceinline__ bool aligned(const void* a) { return (reinterpret_cast<unsigned long long>(a) & 15u) == 0; }

__device__ __forceinline__ bool is_wide(const SlotStep& s, int size) {
  return size % V == 0 && aligned(s.z) && aligned(s.x_last) && aligned(s.x_rows) && aligned(s.next_z) &&
         aligned(s.next_x_prev) && aligned(s.source) && aligned(s.noise);
}

// One bit for each of the V elements from `first`: is its position held by the source?
__device__ __forceinline__ uint32_t held_bits(const uint8_t* mask, int first, int width, int count) {
  if (width % V == 0) return mask[first / width] ? (1u << V) - 1u : 0u;
  uint32_t held = 0;
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (i < count && mask[(first + i) / width]) held |= 1u << i;
  return held;
}

// x = sum of weight * output over the guidance rows with a weight; without outputs, the last estimate.
__device__ __forceinline__ void combine(float (&x)[V], const SlotStep& s, int size, int first, bool wide, int count) {
  if (!s.x_rows) {
    load(x, s.x_last + first, wide, count);
    return;
  }
  bool no_weights = true;
#pragma unroll
  for (int k = 0; k < MAX_ROWS; ++k) no_weights = no_weights && (k >= s.num_outputs || s.weights[k] == 0.0f);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = empty_sum(no_weights);
#pragma unroll  // an index that is not known would put all of s into local memory
  for (int k = 0; k < MAX_ROWS; ++k) {
    if (k >= s.num_outputs) continue;
    float output[V];
    load(output, s.x_rows + static_cast<int64_t>(k) * size + first, wide, count);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = add_term(x[i], s.weights[k], output[i]);
  }
}

__device__ __forceinline__ void write_rows(const SlotStep& s, const float (&z)[V], const float (&x)[V], uint32_t held,
                                           int size, int first, bool wide, int count) {
  for (int k = 0; k < s.num_rows; ++k) {
    const uint32_t row = s.row(k), hidden = row & SEES_SOURCE ? 0u : held;
    const int64_t at = static_cast<int64_t>(k) * size + first;
    float out[V];
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = hidden >> i & 1u ? 0.0f : row & OF_ESTIMATE ? x[i] : z[i];
    store(s.next_z + at, out, wide, count);
    if (!s.next_x_prev) continue;
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = hidden >> i & 1u ? 0.0f : next_prev(s.coef, row, x[i]);
    store(s.next_x_prev + at, out, wide, count);
  }
}

}  // namespace elf

// next_t, next_s, next_mode: (rows of the call), each null where the model has no such input.
extern "C" __global__ void __launch_bounds__(256)
    elf_step(const elf::SlotStep* slots, float* next_t, float* next_s, float* next_mode, int32_t length, int32_t width) {
  using namespace elf;
  const SlotStep s = slots[blockIdx.y];
  const int size = length * width, first = (blockIdx.x * blockDim.x + threadIdx.x) * V;
  if (!s.z || first >= size) return;
  const int count = size - first < V ? size - first : V;
  const bool wide = is_wide(s, size);
  if (first == 0) {
    for (int k = 0; k < s.num_rows; ++k) {
      const bool decodes = s.row(k) & DECODES;
      if (next_t) next_t[s.first_row + k] = decodes ? 1.0f : s.t;
      if (next_s) next_s[s.first_row + k] = s.s;
      if (next_mode) next_mode[s.first_row + k] = decodes ? 1.0f : 0.0f;
    }
  }

  float z[V] = {}, x[V], last[V] = {}, noise[V] = {}, kept[V] = {};
  combine(x, s, size, first, wide, count);
  const uint32_t held = s.mask ? held_bits(s.mask, first, width, count) : 0u;
  if (held) load(kept, s.source + first, wide, count);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = held >> i & 1u ? kept[i] : x[i];

  if (s.coef.z != 0.0f) load(z, s.z + first, wide, count);
  if (s.coef.last != 0.0f) load(last, s.x_last + first, wide, count);
  if (s.coef.noise != 0.0f) {
    if (s.noise) {
      load(noise, s.noise + first, wide, count);
    } else {
      const Quad quad = normal4(s.seed, s.noise_index, static_cast<uint32_t>(first / 4));
#pragma unroll
      for (int i = 0; i < V; ++i) noise[i] = quad.v[i];
    }
  }
  bool finite = true;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    z[i] = held >> i & 1u ? kept[i] : new_z(s.coef, z[i], x[i], last[i], noise[i]);
    finite = finite && (i >= count || (bits_of(z[i]) & 0x7f800000u) != 0x7f800000u);
  }
  if (s.not_finite && !finite) *s.not_finite = 1;
  store(s.z + first, z, wide, count);
  store(s.x_last + first, x, wide, count);
  write_rows(s, z, x, held, size, first, wide, count);
}
