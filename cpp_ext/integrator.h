// The arithmetic of the integrator, compiled twice: by the host compiler for the CPU extension, by NVRTC for the GPU.
//
// elf_rt/sampling/noise.py and elf_rt/sampling/integrator.py are the specification. The three give the same bits, because every operation
// here is one correctly rounded +, -, x, sqrt or conversion, in the same order, and none is fused: through the _rn
// intrinsics on the device, through -ffp-contract=off (setup.py) on the host.
#pragma once

#if defined(__CUDACC_RTC__)
typedef unsigned char uint8_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#define ELF_FN __host__ __device__ __forceinline__
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__GNUC__)
#define ELF_FN inline __attribute__((always_inline))
#else
#define ELF_FN inline
#endif
#endif

namespace elf {

constexpr int MAX_ROWS = 4;  // guidance rows of one text in one network call

// Flags of a row of a network call, as in elf_rt/sampling/schedule.py.
constexpr unsigned int SEES_SOURCE = 1, SEES_PREV = 2, DECODES = 4, OF_ESTIMATE = 8;
constexpr int ROW_BITS = 4;

// ---- single operations

#if defined(__CUDA_ARCH__)
ELF_FN float add(float a, float b) { return __fadd_rn(a, b); }
ELF_FN float sub(float a, float b) { return __fsub_rn(a, b); }
ELF_FN float mul(float a, float b) { return __fmul_rn(a, b); }
ELF_FN float square_root(float a) { return __fsqrt_rn(a); }
ELF_FN uint32_t bits_of(float a) { return __float_as_uint(a); }
ELF_FN float float_of(uint32_t a) { return __uint_as_float(a); }
ELF_FN uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
#else
ELF_FN float add(float a, float b) { return a + b; }
ELF_FN float sub(float a, float b) { return a - b; }
ELF_FN float mul(float a, float b) { return a * b; }
ELF_FN float square_root(float a) { return std::sqrt(a); }
ELF_FN uint32_t bits_of(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}
ELF_FN float float_of(uint32_t a) {
  float value;
  std::memcpy(&value, &a, sizeof value);
  return value;
}
ELF_FN uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}
#endif

// ---- noise: Philox4x32-10 (Salmon et al., SC11) and Box-Muller

struct Words {
  uint32_t w[4];
};

ELF_FN Words philox4x32(Words c, uint32_t key0, uint32_t key1) {
#if defined(__CUDACC_RTC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(0xD2511F53u, c.w[0]), low0 = 0xD2511F53u * c.w[0];
    const uint32_t high1 = multiply_high(0xCD9E8D57u, c.w[2]), low1 = 0xCD9E8D57u * c.w[2];
    c = {{high1 ^ c.w[1] ^ key0, low1, high0 ^ c.w[3] ^ key1, low0}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// ln u, u = (word + 1) / 2^32 rounded to float32.
ELF_FN float log_fraction(uint32_t word) {
  const uint32_t bits = bits_of(add(static_cast<float>(word), 1.0f)) + (0x3f800000u - 0x3f3504f3u);
  const float exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - (127 + 32));
  const float f = sub(float_of((bits & 0x007fffffu) + 0x3f3504f3u), 1.0f);  // in [sqrt(1/2) - 1, sqrt(2) - 1], exact
  const float square = mul(f, f);
  float p = add(mul(-0.07902744f, f), 0.12622319f);
  p = add(mul(p, f), -0.12998183f);
  p = add(mul(p, f), 0.14214496f);
  p = add(mul(p, f), -0.16641282f);
  p = add(mul(p, f), 0.20001045f);
  p = add(mul(p, f), -0.25000307f);
  p = add(mul(p, f), 0.3333333f);
  float tail = mul(mul(f, square), p);
  tail = add(tail, mul(exponent, -2.1219444e-4f));
  tail = sub(tail, mul(0.5f, square));
  return add(add(f, tail), mul(exponent, 0.693359375f));
}

struct Pair {
  float first, second;
};

// Two words -> r cos 2 pi a, r sin 2 pi a, with r = sqrt(-2 ln u) and a = angle / 2^32.
ELF_FN Pair box_muller(uint32_t radius, uint32_t angle) {
  const float r = square_root(mul(-2.0f, log_fraction(radius)));
  const uint32_t quarter = (angle + (1u << 29)) >> 30;
  const float y = mul(static_cast<float>(static_cast<int32_t>(angle << 2)), 0x1p-32f);  // of a quarter turn
  const float square = mul(y, y);
  float s = add(mul(-0.004602149f, square), 0.07968022f);
  s = add(mul(s, square), -0.6459635f);
  s = mul(y, add(mul(s, square), 1.5707964f));
  float c = add(mul(0.0009067399f, square), -0.020861529f);
  c = add(mul(c, square), 0.2536694f);
  c = add(1.0f, mul(square, add(mul(c, square), -1.2337005f)));
  const bool swap = quarter & 1u;
  const float sine = float_of(bits_of(swap ? c : s) ^ (quarter & 2u) << 30);
  const float cosine = float_of(bits_of(swap ? s : c) ^ ((quarter + 1u) & 2u) << 30);
  return {mul(r, cosine), mul(r, sine)};
}

struct Quad {
  float v[4];
};

// The noise of elements 4 quad .. 4 quad + 3 of one sample in one step.
ELF_FN Quad normal4(uint64_t seed, uint32_t step, uint32_t quad) {
  const Words words =
      philox4x32({{quad, step, 0u, 0u}}, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const Pair a = box_muller(words.w[0], words.w[1]), b = box_muller(words.w[2], words.w[3]);
  return {{a.first, a.second, b.first, b.second}};
}

// ---- the step

// A sum runs from left to right. A term with factor 0 is left out, whatever it holds; -0 is the value that a first
// term leaves unchanged, and an empty sum is +0.
ELF_FN float add_term(float sum, float factor, float value) {
  return factor == 0.0f ? sum : add(sum, mul(factor, value));
}

struct Coefficients {
  float z, x, last, noise, prev;  // A, B, C, D, X of elf_rt/sampling/schedule.py
};

ELF_FN float empty_sum(bool no_terms) { return no_terms ? 0.0f : -0.0f; }

// z <- A z + B x + C x_last + D noise for one element.
ELF_FN float new_z(const Coefficients& c, float z, float x, float x_last, float noise) {
  float sum = empty_sum(c.z == 0.0f && c.x == 0.0f && c.last == 0.0f && c.noise == 0.0f);
  sum = add_term(sum, c.z, z);
  sum = add_term(sum, c.x, x);
  sum = add_term(sum, c.last, x_last);
  return add_term(sum, c.noise, noise);
}

// The next call's x_prev; 0 where X is 0, whatever x holds.
ELF_FN float next_prev(const Coefficients& c, uint32_t row, float x) {
  return (row & SEES_PREV) && c.prev != 0.0f ? mul(c.prev, x) : 0.0f;
}

// One text in one pass: what elf_rt/sampling/integrator.py calls a SlotStep. Addresses may be null where it says so.
struct SlotStep {
  float *z, *x_last;            // (length, width), the slot's state
  const float* x_rows;          // (num_outputs, length, width), the last call's outputs; null: x is x_last as it stands
  float *next_z, *next_x_prev;  // (num_rows, length, width), the rows of the next call; x_prev null: no such input
  const float* source;          // (length, width), with mask (length); both null: nothing is held
  const uint8_t* mask;
  const float* noise;           // (length, width); null: drawn from seed and noise_index
  int32_t* not_finite;          // set to 1 where the new z is not finite; null: not asked
  uint64_t seed;
  Coefficients coef;
  float weights[MAX_ROWS];
  uint32_t noise_index;
  uint32_t rows;                // ROW_BITS of flags for each row of the next call, the first one lowest
  int32_t num_outputs, num_rows;
  int32_t first_row;            // of the next call: where its t, s and mode are
  float t, s;                   // of the denoising rows; a decoding row has t = 1

  ELF_FN uint32_t row(int k) const { return rows >> (ROW_BITS * k) & ((1u << ROW_BITS) - 1u); }
};

}  // namespace elf
