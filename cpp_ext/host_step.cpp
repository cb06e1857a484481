#include "host_step.h"

#include <algorithm>
#include <cstring>

#include "integrator.h"
#include "thread_pool.h"

// One binary for every x86: the loader picks the widest of these that the machine has. Other targets get the baseline.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define ELF_EVERY_VECTOR_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ELF_EVERY_VECTOR_WIDTH
#endif

namespace elf {
namespace {

constexpr int64_t BLOCK = 1024;        // elements whose temporaries stay in the first-level cache; a multiple of 4
constexpr int64_t CHUNK = 16 * BLOCK;  // elements of one sample that one thread takes at a time

template <typename T>
ELF_FN void add_output(const Step& s, int row, int64_t at, int64_t count, float weight, float* sum) {
  const T* output = static_cast<const T*>(s.x_rows.data) + row * s.batch * s.length * s.width + at;
  for (int64_t i = 0; i < count; ++i) sum[i] = add(sum[i], mul(weight, to_float(output[i])));
}

// x = sum of weight * output over the guidance rows with a weight.
ELF_FN void combine(const Step& s, int64_t b, int64_t at, int64_t count, float* x) {
  bool empty = true;
  for (int k = 0; k < s.x_rows.rows; ++k) empty = empty && s.weights[k * s.batch + b] == 0.0f;
  std::fill_n(x, count, empty_sum(empty));
  for (int k = 0; k < s.x_rows.rows; ++k) {
    const float weight = s.weights[k * s.batch + b];
    if (weight == 0.0f) continue;
    switch (s.x_rows.type) {
      case NetworkType::float32: add_output<float>(s, k, at, count, weight, x); break;
      case NetworkType::float16: add_output<Half>(s, k, at, count, weight, x); break;
      case NetworkType::bfloat16: add_output<BFloat16>(s, k, at, count, weight, x); break;
    }
  }
}

ELF_FN void draw(uint64_t seed, uint32_t index, int64_t first, int64_t count, float* noise) {
  for (int64_t q = 0; q < (count + 3) / 4; ++q) {
    const Quad quad = normal4(seed, index, static_cast<uint32_t>(first / 4 + q));
    for (int i = 0; i < 4; ++i) noise[4 * q + i] = quad.v[i];
  }
}

// Calls f(offset from first, length) for each piece of [first, first + count) that lies in a masked position.
template <typename F>
ELF_FN void for_held(const Step& s, int64_t b, int64_t first, int64_t count, F f) {
  for (int64_t l = first / s.width; l * s.width < first + count; ++l) {
    if (!s.mask[b * s.length + l]) continue;
    const int64_t begin = std::max(first, l * s.width), end = std::min(first + count, (l + 1) * s.width);
    f(begin - first, end - begin);
  }
}

template <typename T>
ELF_FN void write_as(T* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_float<T>(from[i]);
}

// One row of a network tensor, 0 at masked positions unless the row sees them.
ELF_FN void write(const Step& s, const NetworkTensor& tensor, int row, int64_t b, int64_t first, int64_t count,
                  const float* values) {
  const int64_t at = (row * s.batch + b) * s.length * s.width + first;
  const int64_t bytes = tensor.type == NetworkType::float32 ? 4 : 2;
  char* to = static_cast<char*>(tensor.data) + at * bytes;
  switch (tensor.type) {
    case NetworkType::float32: std::memcpy(to, values, count * 4); break;
    case NetworkType::float16: write_as(reinterpret_cast<Half*>(to), values, count); break;
    case NetworkType::bfloat16: write_as(reinterpret_cast<BFloat16*>(to), values, count); break;
  }
  if (s.mask && !s.sees_source[row])
    for_held(s, b, first, count, [&](int64_t i, int64_t n) { std::memset(to + i * bytes, 0, n * bytes); });
}

// Elements [first, first + count) of sample b.
ELF_EVERY_VECTOR_WIDTH void step_block(const Step& s, int64_t b, int64_t first, int64_t count) {
  const float* coef = s.coef + 5 * b;
  const Coefficients c = {coef[0], coef[1], coef[2], coef[3], coef[4]};
  const int64_t at = b * s.length * s.width + first;
  const bool draws = (s.noise || s.seeds) && c.noise != 0.0f;
  alignas(64) float x[BLOCK], noise_block[BLOCK];
  float *z = s.z + at, *x_last = s.x_last + at;

  combine(s, b, at, count, x);
  const float* noise = draws && s.noise ? s.noise + at : noise_block;
  if (draws && !s.noise) draw(s.seeds[b], s.noise_index, first, count, noise_block);
  const auto restore = [&](float* values) {
    if (s.mask)
      for_held(s, b, first, count, [&](int64_t i, int64_t n) { std::memcpy(values + i, s.source + at + i, n * 4); });
  };
  restore(x);
  if (draws)
    for (int64_t i = 0; i < count; ++i) z[i] = new_z(c, true, z[i], x[i], x_last[i], noise[i]);
  else
    for (int64_t i = 0; i < count; ++i) z[i] = new_z(c, false, z[i], x[i], x_last[i], 0.0f);
  restore(z);
  std::memcpy(x_last, x, count * 4);

  for (int k = 0; k < s.next_z.rows; ++k) write(s, s.next_z, k, b, first, count, z);
  if (s.next_x_prev.rows == 0) return;
  if (c.prev != 1.0f)
    for (int64_t i = 0; i < count; ++i) x[i] = next_prev(c, true, x[i]);
  alignas(64) static constexpr float zeros[BLOCK] = {};
  for (int k = 0; k < s.next_x_prev.rows; ++k) write(s, s.next_x_prev, k, b, first, count, s.sees_prev[k] ? x : zeros);
}

}  // namespace

void run_step(const Step& s) {
  const int64_t size = s.length * s.width, chunks = (size + CHUNK - 1) / CHUNK;
  const auto step_chunk = [&](int64_t chunk) {
    const int64_t b = chunk / chunks, begin = chunk % chunks * CHUNK, end = std::min(size, begin + CHUNK);
    for (int64_t first = begin; first < end; first += BLOCK) step_block(s, b, first, std::min(BLOCK, end - first));
  };
  const bool worth_waking_threads = s.batch * size >= 2 * CHUNK;
  ThreadPool::shared().run(s.batch * chunks, worth_waking_threads, step_chunk);
}

void set_num_threads(int count) { ThreadPool::shared().resize(count); }

}  // namespace elf
