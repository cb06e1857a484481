#include "host_step.h"

#include <algorithm>
#include <cstring>

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
constexpr int64_t CHUNK = 16 * BLOCK;  // elements of one slot that one thread takes at a time

struct Size {
  int64_t length, width;

  int64_t elements() const { return length * width; }
};

// x = sum of weight * output over the guidance rows with a weight; without outputs, the last estimate.
ELF_FN void combine(const SlotStep& s, Size size, int64_t first, int64_t count, float* x) {
  if (!s.x_rows) {
    std::memcpy(x, s.x_last + first, count * 4);
    return;
  }
  bool empty = true;
  for (int k = 0; k < s.num_outputs; ++k) empty = empty && s.weights[k] == 0.0f;
  std::fill_n(x, count, empty_sum(empty));
  for (int k = 0; k < s.num_outputs; ++k) {
    const float weight = s.weights[k];
    if (weight == 0.0f) continue;
    const float* output = s.x_rows + k * size.elements() + first;
    for (int64_t i = 0; i < count; ++i) x[i] = add(x[i], mul(weight, output[i]));
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
ELF_FN void for_held(const SlotStep& s, Size size, int64_t first, int64_t count, F f) {
  if (!s.mask) return;
  for (int64_t l = first / size.width; l * size.width < first + count; ++l) {
    if (!s.mask[l]) continue;
    const int64_t begin = std::max(first, l * size.width), end = std::min(first + count, (l + 1) * size.width);
    f(begin - first, end - begin);
  }
}

// A row of the next call, 0 at masked positions unless the row sees them.
ELF_FN void write(const SlotStep& s, Size size, int row, int64_t first, int64_t count, float* next,
                  const float* values) {
  float* to = next + row * size.elements() + first;
  std::memcpy(to, values, count * 4);
  if (!(s.row(row) & SEES_SOURCE))
    for_held(s, size, first, count, [&](int64_t i, int64_t n) { std::memset(to + i, 0, n * 4); });
}

// Elements [first, first + count) of one slot.
ELF_EVERY_VECTOR_WIDTH void step_block(const SlotStep& s, Size size, int64_t first, int64_t count) {
  const Coefficients c = s.coef;
  alignas(64) float x[BLOCK], prev[BLOCK], noise_block[BLOCK];
  float *z = s.z + first, *x_last = s.x_last + first;

  combine(s, size, first, count, x);
  const float* noise = s.noise ? s.noise + first : noise_block;
  if (c.noise != 0.0f && !s.noise) draw(s.seed, s.noise_index, first, count, noise_block);
  const auto restore = [&](float* values) {
    for_held(s, size, first, count,
             [&](int64_t i, int64_t n) { std::memcpy(values + i, s.source + first + i, n * 4); });
  };
  restore(x);
  if (c.noise != 0.0f)
    for (int64_t i = 0; i < count; ++i) z[i] = new_z(c, z[i], x[i], x_last[i], noise[i]);
  else
    for (int64_t i = 0; i < count; ++i) z[i] = new_z(c, z[i], x[i], x_last[i], 0.0f);
  restore(z);
  std::memcpy(x_last, x, count * 4);

  for (int k = 0; k < s.num_rows; ++k) write(s, size, k, first, count, s.next_z, s.row(k) & OF_ESTIMATE ? x : z);
  if (!s.next_x_prev) return;
  for (int k = 0; k < s.num_rows; ++k) {
    for (int64_t i = 0; i < count; ++i) prev[i] = next_prev(c, s.row(k), x[i]);
    write(s, size, k, first, count, s.next_x_prev, prev);
  }
}

}  // namespace

void run_step(const std::vector<SlotStep>& slots, int64_t length, int64_t width) {
  const Size size{length, width};
  const int64_t elements = size.elements(), chunks = (elements + CHUNK - 1) / CHUNK;
  const int64_t total = static_cast<int64_t>(slots.size()) * chunks;
  const auto step_chunk = [&](int64_t chunk) {
    const SlotStep& slot = slots[chunk / chunks];
    const int64_t begin = chunk % chunks * CHUNK, end = std::min(elements, begin + CHUNK);
    for (int64_t first = begin; first < end; first += BLOCK) step_block(slot, size, first, std::min(BLOCK, end - first));
  };
  const bool worth_waking_threads = static_cast<int64_t>(slots.size()) * elements >= 2 * CHUNK;
  ThreadPool::shared().run(total, worth_waking_threads, step_chunk);
}

void set_num_threads(int count) { ThreadPool::shared().resize(count); }

}  // namespace elf
