// The integrator on the GPU: elf_rt/sampling/integrator.py's step as one kernel, a sampler's table as data in device memory.
//
// Which row of the table a launch runs is not in its arguments but in `Progress`, so that one captured graph serves
// every seed, sampler, guidance and number of steps:
//
//   row = progress.base + offset    offset counts the step launches inside one graph: 0, 1, 2, ...
//   row > progress.last (= N)       the launch does nothing: the steps that a graph has beyond N leave no trace, and
//                                   the network calls between them repeat the last call on unchanged inputs
//   final = 1                       runs row N + 1, which prepares the decoding call, whatever base and offset say
//   elf_advance(progress, k)        ends a graph of k steps: base += k, at most N + 1
//
// So a sample is   {base = 0, last = N}   step[0] step[1] (network step[2 .. N]) network step[final] network
// in one graph (captured for N, or for more and run for fewer), or the same cut into graphs of k steps, each closed by
// elf_advance, which are launched again and again. A given start instead of noise is row 0 with A = 1 on the given z.
//
// Launch: elf_advance as one thread; the others with grid (ceil(length * width / (V * block)), batch, 1), V = 4
// elements a thread for float32, 8 for 16-bit types: every access is 16 bytes wide where addresses and sizes allow it,
// and by element otherwise.
#include "integrator.h"

namespace elf {

struct Progress {
  int32_t base, last;
  uint32_t sees;  // bit 2k: guidance row k of the next call sees the source; bit 2k + 1: it sees x_prev
  int32_t unused;
};

template <typename T, int V>
struct alignas(16) Pack {
  T v[V];
};

// V consecutive elements as float32; `wide` is the same for the whole launch.
template <typename T, int V>
__device__ __forceinline__ void load(float (&out)[V], const T* from, bool wide, int count) {
  if (wide) {
    const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = to_float(pack.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <typename T, int V>
__device__ __forceinline__ void store(T* to, const float (&values)[V], bool wide, int count) {
  if (wide) {
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) pack.v[i] = from_float<T>(values[i]);
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < count) to[i] = from_float<T>(values[i]);
  }
}

__device__ __forceinline__ bool aligned(const void* a) { return (reinterpret_cast<unsigned long long>(a) & 15u) == 0; }

// One bit for each of the V elements from `first`: is its position held by the source?
template <int V>
__device__ __forceinline__ uint32_t held_bits(const uint8_t* mask, int first, int width, int count) {
  if (width % V == 0) return mask[first / width] ? (1u << V) - 1u : 0u;
  uint32_t held = 0;
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (i < count && mask[(first + i) / width]) held |= 1u << i;
  return held;
}

template <int V>
__device__ __forceinline__ void draw(float (&noise)[V], uint64_t seed, int row, int first) {
#pragma unroll
  for (int i = 0; i < V; i += 4) {
    const Quad quad = normal4(seed, static_cast<uint32_t>(row), static_cast<uint32_t>((first + i) / 4));
#pragma unroll
    for (int k = 0; k < 4; ++k) noise[i + k] = quad.v[k];
  }
}

// The arguments of the step kernels, in this order. Addresses may be null where it says so.
#define ELF_STEP_PARAMETERS(T)                                                                             \
  float *z, float *x_last,         /* (batch, length, width), the state */                                 \
      const T *x_rows,             /* (rows, batch, length, width), the last call's outputs */             \
      T *next_z, T *next_x_prev,   /* (next_rows, batch, length, width); x_prev null: no such input */     \
      float *next_t, float *next_s, float *next_mode, /* (next_rows, batch); each null: no such input */   \
      const float *source, const uint8_t *mask,       /* (batch, length, width), (batch, length); null */  \
      const uint64_t *seeds,       /* (batch) */                                                           \
      const float *noise,          /* (table rows, batch, length, width); null: drawn from seeds */        \
      const float *t, const float *coef, const float *weights, /* the table: (table rows, batch),          \
                                      (table rows, batch, 5), (table rows, table_rows, batch) */           \
      const float *s,              /* (batch), null with next_s */                                         \
      const elf::Progress *progress, int32_t length, int32_t width, int32_t table_rows, int32_t rows,      \
      int32_t next_rows, int32_t offset, int32_t final

template <typename T, int V>
__device__ __forceinline__ void step(ELF_STEP_PARAMETERS(T)) {
  const int batch = gridDim.y, b = blockIdx.y, size = length * width;
  const int first = (blockIdx.x * blockDim.x + threadIdx.x) * V;
  if (first >= size) return;
  const int64_t here = static_cast<int64_t>(b) * size + first, stride = static_cast<int64_t>(batch) * size;
  const int count = size - first < V ? size - first : V;
  const bool wide = size % V == 0 && aligned(z) && aligned(x_last) && aligned(x_rows) && aligned(next_z) &&
                    aligned(next_x_prev) && aligned(source) && aligned(noise);

  // What does not depend on the row is asked for before it is known.
  float state[V], outputs[MAX_ROWS][V];
  load<float, V>(state, z + here, wide, count);
#pragma unroll
  for (int k = 0; k < MAX_ROWS; ++k)
    if (k < rows) load<T, V>(outputs[k], x_rows + k * stride + here, wide, count);

  const int row = final ? progress->last + 1 : progress->base + offset;
  if (row > progress->last && !final) return;
  const int row_b = row * batch + b;
  if (first == 0) {
    for (int k = 0; k < next_rows; ++k) {
      if (next_t) next_t[k * batch + b] = t[row_b];
      if (next_s) next_s[k * batch + b] = s[b];
      if (next_mode) next_mode[k * batch + b] = final ? 1.0f : 0.0f;
    }
  }

  const Coefficients c = {coef[row_b * 5], coef[row_b * 5 + 1], coef[row_b * 5 + 2], coef[row_b * 5 + 3],
                          coef[row_b * 5 + 4]};
  float weight[MAX_ROWS], x[V], last[V] = {}, eps[V] = {};
  bool no_weights = true;
#pragma unroll
  for (int k = 0; k < MAX_ROWS; ++k) {
    weight[k] = k < rows ? weights[(row * table_rows + k) * batch + b] : 0.0f;
    no_weights = no_weights && weight[k] == 0.0f;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    x[i] = empty_sum(no_weights);
#pragma unroll
    for (int k = 0; k < MAX_ROWS; ++k)
      if (k < rows) x[i] = add_term(x[i], weight[k], outputs[k][i]);
  }

  const uint32_t held = mask ? held_bits<V>(mask + static_cast<int64_t>(b) * length, first, width, count) : 0u;
  float kept[V] = {};
  if (held) load<float, V>(kept, source + here, wide, count);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = held >> i & 1u ? kept[i] : x[i];

  if (c.last != 0.0f) load<float, V>(last, x_last + here, wide, count);
  if (c.noise != 0.0f) {
    if (noise)
      load<float, V>(eps, noise + row * stride + here, wide, count);
    else
      draw<V>(eps, seeds[b], row, first);
  }
#pragma unroll
  for (int i = 0; i < V; ++i)
    state[i] = held >> i & 1u ? kept[i] : new_z(c, true, state[i], x[i], last[i], eps[i]);
  store<float, V>(z + here, state, wide, count);
  store<float, V>(x_last + here, x, wide, count);

  for (int k = 0; k < next_rows; ++k) {
    const uint32_t sees = progress->sees >> (2 * k), hidden = sees & 1u ? 0u : held;
    float out[V];
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = hidden >> i & 1u ? 0.0f : state[i];
    store<T, V>(next_z + k * stride + here, out, wide, count);
    if (next_x_prev) {
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = hidden >> i & 1u ? 0.0f : next_prev(c, sees & 2u, x[i]);
      store<T, V>(next_x_prev + k * stride + here, out, wide, count);
    }
  }
}

// A decoding call on the current estimate: z = x_last, x_prev = 0, t = 1, mode 1. One guidance row; the state stays.
template <typename T, int V>
__device__ __forceinline__ void draft(const float* x_last, T* next_z, T* next_x_prev, float* next_t, float* next_s,
                                      float* next_mode, const float* s, int32_t length, int32_t width) {
  const int b = blockIdx.y, size = length * width, first = (blockIdx.x * blockDim.x + threadIdx.x) * V;
  if (first >= size) return;
  const int64_t here = static_cast<int64_t>(b) * size + first;
  const int count = size - first < V ? size - first : V;
  const bool wide = size % V == 0 && aligned(x_last) && aligned(next_z) && aligned(next_x_prev);
  if (first == 0) {
    if (next_t) next_t[b] = 1.0f;
    if (next_s) next_s[b] = s[b];
    if (next_mode) next_mode[b] = 1.0f;
  }
  float x[V];
  const float zeros[V] = {};
  load<float, V>(x, x_last + here, wide, count);
  store<T, V>(next_z + here, x, wide, count);
  if (next_x_prev) store<T, V>(next_x_prev + here, zeros, wide, count);
}

}  // namespace elf

extern "C" __global__ void elf_advance(elf::Progress* progress, int32_t count) {
  const int32_t base = progress->base + count, end = progress->last + 1;
  progress->base = base < end ? base : end;
}

#define ELF_KERNELS(NAME, T, V)                                                                                     \
  extern "C" __global__ void __launch_bounds__(256, 3) elf_step_##NAME(ELF_STEP_PARAMETERS(T)) {                       \
    elf::step<T, V>(z, x_last, x_rows, next_z, next_x_prev, next_t, next_s, next_mode, source, mask, seeds, noise,  \
                    t, coef, weights, s, progress, length, width, table_rows, rows, next_rows, offset, final);      \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256)                                                                 \
      elf_draft_##NAME(const float* x_last, T* next_z, T* next_x_prev, float* next_t, float* next_s,                \
                       float* next_mode, const float* s, int32_t length, int32_t width) {                           \
    elf::draft<T, V>(x_last, next_z, next_x_prev, next_t, next_s, next_mode, s, length, width);                     \
  }

ELF_KERNELS(float32, float, 4)
ELF_KERNELS(float16, elf::Half, 8)
ELF_KERNELS(bfloat16, elf::BFloat16, 8)
