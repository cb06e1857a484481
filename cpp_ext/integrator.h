// The arithmetic of the integrator, compiled twice: by the host compiler for the CPU extension, by NVRTC for the GPU.
//
// elf_rt/sampling/noise.py and elf_rt/sampling/integrator.py are the specification. The three give the same bits, because every operation
// here is one correctly rounded +, -, x, sqrt or conversion, in the same order, and none is fused: through the _rn
// intrinsics on the device, through -ffp-contract=off (setup.py) on the host.
#pragma once

#if defined(__CUDACC_RTC__)
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
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

constexpr int MAX_ROWS = 4;  // guidance rows in one network call

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

// ---- network types; rounding to nearest, ties to even. Branch-free, so that host loops vectorise.

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

ELF_FN float to_float(float value) { return value; }

ELF_FN float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

ELF_FN float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00u ? 112u << 23 : 224u << 23);
  const uint32_t subnormal = bits_of(mul(static_cast<float>(static_cast<int32_t>(magnitude)), 0x1p-24f));
  return float_of((magnitude < 0x0400u ? subnormal : normal) | (value.bits & 0x8000u) << 16);
#endif
}

template <typename T>
ELF_FN T from_float(float value);

template <>
ELF_FN float from_float<float>(float value) {
  return value;
}

template <>
ELF_FN BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + (0x7fffu + (bits >> 16 & 1u))) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

template <>
ELF_FN Half from_float<Half>(float value) {
#if defined(__CUDA_ARCH__)
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding 1/2 rounds to multiples of 2^-24, the spacing of subnormal halves.
  const uint32_t subnormal = bits_of(add(float_of(magnitude), 0.5f)) - bits_of(0.5f);
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {static_cast<uint16_t>((magnitude < 0x477ff000u ? finite : special) | (bits >> 16 & 0x8000u))};
#endif
}

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

// z <- A z + B x + C x_last + D noise for one element; `draws` says whether there is a noise term at all.
ELF_FN float new_z(const Coefficients& c, bool draws, float z, float x, float x_last, float noise) {
  float sum = empty_sum(c.z == 0.0f && c.x == 0.0f && c.last == 0.0f && (c.noise == 0.0f || !draws));
  sum = add_term(sum, c.z, z);
  sum = add_term(sum, c.x, x);
  sum = add_term(sum, c.last, x_last);
  return draws ? add_term(sum, c.noise, noise) : sum;
}

// The next call's x_prev; 0 where X is 0, whatever x holds.
ELF_FN float next_prev(const Coefficients& c, bool seen, float x) {
  return seen && c.prev != 0.0f ? mul(c.prev, x) : 0.0f;
}

}  // namespace elf
