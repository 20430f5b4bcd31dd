// Vectors of one instruction set, chosen by the macro that `kernel.c` is compiled with.
//
// Floats: `VF` of LANES. Codes beside them: `VD`, LANES bytes widened to 32 bits; the shift of a field leaves higher
// fields above it, which a table of 16 entries with repeated values need not know of.
// Bytes: `VB` of BYTES = 4 * LANES. Sums: `VI` of LANES int32; lane l adds up the products of bytes 4 l to 4 l + 3.
// `FLIP`: added to a code of 8 bits to make an operand of `i_dot8`; `X_FLIP`: to an activation, for `i_quad`.
// `TOKENS`: of a tile of floats in panels.c, as many as registers hold with two vectors of columns. `MANY_OF_BYTES`,
// `MANY_OF_FLOATS`: tokens from which that is the faster way, measured for AVX-512 and AVX2, guessed for the rest.
// `KEEP` makes a variable be in a register.
#ifndef MPQ_LANES_H
#define MPQ_LANES_H

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }  // a / b, rounded up
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(MPQ_AVX512)
#include <immintrin.h>

#define ISA avx512
#define MANY_OF_BYTES 4
#define MANY_OF_FLOATS 12
#define TOKENS 12
#define LANES 16
#define FLIP 128
#define X_FLIP 128
#define HAS __builtin_cpu_supports
#define SUPPORTED (HAS("avx512f") && HAS("avx512bw") && HAS("avx512vl") && HAS("avx512vnni"))

typedef __m512 VF;
typedef __m512i VD, VB, VI;
typedef struct { __m512 values; } Table;

INLINE VF f_zero(void) { return _mm512_setzero_ps(); }
INLINE VF f_all(float a) { return _mm512_set1_ps(a); }
INLINE VF f_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE VF f_load_part(const float *p, int64_t n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
INLINE void f_store(float *p, VF a) { _mm512_storeu_ps(p, a); }
INLINE VF f_add(VF a, VF b) { return _mm512_add_ps(a, b); }
INLINE VF f_mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
INLINE VF f_fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float f_sum(VF a) { return _mm512_reduce_add_ps(a); }

INLINE __m128i part16(const uint8_t *p, int64_t n) { return _mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), p); }
INLINE VD d_load(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE VD d_load_part(const uint8_t *p, int64_t n) { return _mm512_cvtepu8_epi32(part16(p, n)); }
INLINE VF d_bytes(const void *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p))); }
INLINE Table t_load(const float *p) { Table t = {_mm512_loadu_ps(p)}; return t; }
INLINE VF d_look_up(VD d, int shift, Table t) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(d, (unsigned)shift), t.values);
}
INLINE VF d_signed(VD d, int shift) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(d, (unsigned)(24 - shift)), 24));
}

INLINE VB b_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE VB b_load_part(const void *p, int64_t n) { return _mm512_maskz_loadu_epi8(~0ull >> (64 - n), p); }
INLINE void b_store(void *p, VB a) { _mm512_storeu_si512(p, a); }
INLINE VB b_all(uint8_t a) { return _mm512_set1_epi8((char)a); }
INLINE VB b_field(VB b, int shift, VB mask) { return _mm512_and_si512(_mm512_srli_epi16(b, (unsigned)shift), mask); }
INLINE VB b_minus(VB a, VB b) { return _mm512_sub_epi8(a, b); }
INLINE VB b_flip(VB b, uint8_t a) { return _mm512_xor_si512(b, b_all(a)); }
INLINE VB b_word(const void *p) { int32_t a; __builtin_memcpy(&a, p, 4); return _mm512_set1_epi32(a); }
INLINE VI i_load(const int32_t *p) { return _mm512_loadu_si512(p); }
INLINE void i_store(int32_t *p, VI a) { _mm512_storeu_si512(p, a); }
INLINE VI i_zero(void) { return _mm512_setzero_si512(); }
INLINE VI i_add(VI a, VI b) { return _mm512_add_epi32(a, b); }
INLINE VI i_minus(VI a) { return _mm512_sub_epi32(_mm512_setzero_si512(), a); }
INLINE VF i_float(VI a) { return _mm512_cvtepi32_ps(a); }
// Codes are unsigned, activations signed; sums wrap and do not saturate.
INLINE VI i_dot(VI sum, VB codes, VB x) { return _mm512_dpbusd_epi32(sum, codes, x); }
INLINE VI i_dot8(VI sum, VB codes, VB x) { return i_dot(sum, codes, x); }
INLINE VI i_quad(VI sum, VB x, VB codes, int bits) { (void)bits; return i_dot(sum, x, codes); }

#elif defined(MPQ_AVX2)
#include <immintrin.h>

#define ISA avx2
#define MANY_OF_BYTES 12
#define MANY_OF_FLOATS 24
#define TOKENS 6
#define LANES 8
#define FLIP 0
#define X_FLIP 128
#define SUPPORTED (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))

typedef __m256 VF;
typedef __m256i VD, VB, VI;
typedef struct { __m256 low, high; } Table;

INLINE VF f_zero(void) { return _mm256_setzero_ps(); }
INLINE VF f_all(float a) { return _mm256_set1_ps(a); }
INLINE VF f_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE VF f_load_part(const float *p, int64_t n) {
  float whole[8] = {0};
  for (int64_t i = 0; i < n; ++i) whole[i] = p[i];
  return f_load(whole);
}
INLINE void f_store(float *p, VF a) { _mm256_storeu_ps(p, a); }
INLINE VF f_add(VF a, VF b) { return _mm256_add_ps(a, b); }
INLINE VF f_mul(VF a, VF b) { return _mm256_mul_ps(a, b); }
INLINE VF f_fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float f_sum(VF a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

INLINE VD d_load(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE VF d_bytes(const void *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p))); }
INLINE VD d_load_part(const uint8_t *p, int64_t n) {
  uint8_t whole[8] = {0};
  for (int64_t i = 0; i < n; ++i) whole[i] = p[i];
  return d_load(whole);
}
INLINE Table t_load(const float *p) { Table t = {f_load(p), f_load(p + 8)}; return t; }
INLINE VF d_look_up(VD d, int shift, Table t) {
  VD code = _mm256_srli_epi32(d, shift);
  __m256 fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, code), _mm256_permutevar8x32_ps(t.high, code), fourth_bit);
}
INLINE VF d_signed(VD d, int shift) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(d, 24 - shift), 24));
}

INLINE VB b_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE VB b_load_part(const void *p, int64_t n) {
  uint8_t whole[32] = {0};
  for (int64_t i = 0; i < n; ++i) whole[i] = ((const uint8_t *)p)[i];
  return b_load(whole);
}
INLINE void b_store(void *p, VB a) { _mm256_storeu_si256((__m256i *)p, a); }
INLINE VB b_all(uint8_t a) { return _mm256_set1_epi8((char)a); }
INLINE VB b_field(VB b, int shift, VB mask) { return _mm256_and_si256(_mm256_srli_epi16(b, shift), mask); }
INLINE VB b_minus(VB a, VB b) { return _mm256_sub_epi8(a, b); }
INLINE VB b_flip(VB b, uint8_t a) { return _mm256_xor_si256(b, b_all(a)); }
INLINE VB b_word(const void *p) { int32_t a; __builtin_memcpy(&a, p, 4); return _mm256_set1_epi32(a); }
INLINE VI i_load(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE void i_store(int32_t *p, VI a) { _mm256_storeu_si256((__m256i *)p, a); }
INLINE VI i_zero(void) { return _mm256_setzero_si256(); }
INLINE VI i_add(VI a, VI b) { return _mm256_add_epi32(a, b); }
INLINE VI i_minus(VI a) { return _mm256_sub_epi32(_mm256_setzero_si256(), a); }
INLINE VF i_float(VI a) { return _mm256_cvtepi32_ps(a); }
// Pairs of products of at most 15 * 127 fit int16; of 8 bits they need not, so those are widened first.
INLINE VI i_dot(VI sum, VB codes, VB x) {
  return i_add(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}
INLINE VI i_dot8(VI sum, VB codes, VB x) {
  __m256i low = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(codes)),
                                  _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x)));
  __m256i high = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm256_extracti128_si256(codes, 1)),
                                   _mm256_cvtepi8_epi16(_mm256_extracti128_si256(x, 1)));
  return i_add(sum, i_add(low, high));  // in other lanes than `i_dot`, which no sum of lanes sees
}
INLINE VI i_quad(VI sum, VB x, VB codes, int bits) {
  if (bits < 8) return i_dot(sum, x, codes);  // 2 * 255 * 8 fit, too
  VI codes_of_even = _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8);
  VI even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)), codes_of_even);
  return i_add(sum, i_add(even, _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(codes, 8))));
}

#else  // NEON, and whatever the compiler makes of vectors of 16 bytes elsewhere

#if defined(MPQ_DOTPROD)
#include <sys/auxv.h>
#define ISA dotprod
#define SUPPORTED (getauxval(AT_HWCAP) >> 20 & 1)  // HWCAP_ASIMDDP
#else
#define ISA base
#define SUPPORTED 1
#endif
#define LANES 4
#define MANY_OF_BYTES 12
#define MANY_OF_FLOATS 24
#define TOKENS 12
#define FLIP 0
#define X_FLIP 0

typedef float VF __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));
typedef uint32_t VD __attribute__((vector_size(16)));
typedef int8_t VB __attribute__((vector_size(16)));
#if defined(__aarch64__)
#include <arm_neon.h>
typedef struct { uint8x16x4_t values; } Table;
#else
typedef struct { const float *values; } Table;
#endif

INLINE VF f_all(float a) { return (VF){a, a, a, a}; }
INLINE VF f_zero(void) { return f_all(0); }
INLINE VF f_load(const float *p) { return (VF){p[0], p[1], p[2], p[3]}; }
INLINE VF f_load_part(const float *p, int64_t n) { return (VF){p[0], n > 1 ? p[1] : 0, n > 2 ? p[2] : 0, 0}; }
INLINE void f_store(float *p, VF a) { __builtin_memcpy(p, &a, sizeof a); }
INLINE VF f_add(VF a, VF b) { return a + b; }
INLINE VF f_mul(VF a, VF b) { return a * b; }
INLINE VF f_fma(VF a, VF b, VF c) { return a * b + c; }
INLINE float f_sum(VF a) { return (a[0] + a[2]) + (a[1] + a[3]); }

INLINE VD d_load_part(const uint8_t *p, int64_t n) { return (VD){p[0], n > 1 ? p[1] : 0, n > 2 ? p[2] : 0, 0}; }
INLINE VF d_signed(VD d, int shift) { return __builtin_convertvector((VI)(d << (uint32_t)(24 - shift)) >> 24, VF); }
#if defined(__aarch64__)
INLINE VD d_load(const uint8_t *p) {
  uint32_t bytes;
  __builtin_memcpy(&bytes, p, 4);
  return (VD)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
}
INLINE Table t_load(const float *p) { Table t = {vld1q_u8_x4((const uint8_t *)p)}; return t; }
// Bytes 4 c to 4 c + 3 of the table are the float of code c.
INLINE VF d_look_up(VD d, int shift, Table t) {
  VD at = ((d >> (uint32_t)shift) & 15) * 0x04040404u + 0x03020100u;
  return (VF)vqtbl4q_u8(t.values, (uint8x16_t)at);
}
#else
INLINE VD d_load(const uint8_t *p) { return (VD){p[0], p[1], p[2], p[3]}; }
INLINE Table t_load(const float *p) { Table t = {p}; return t; }
INLINE VF d_look_up(VD d, int shift, Table t) {
  VD code = (d >> (uint32_t)shift) & 15;
  return (VF){t.values[code[0]], t.values[code[1]], t.values[code[2]], t.values[code[3]]};
}
#endif

INLINE VF d_bytes(const uint8_t *p) { return d_signed(d_load(p), 0); }

INLINE VB b_load_part(const void *p, int64_t n) {
  VB whole = {0};
  for (int64_t i = 0; i < n; ++i) whole[i] = ((const int8_t *)p)[i];
  return whole;
}
INLINE VB b_load(const void *p) {
  VB whole;
  __builtin_memcpy(&whole, p, sizeof whole);
  return whole;
}
INLINE void b_store(void *p, VB a) { __builtin_memcpy(p, &a, sizeof a); }
INLINE VB b_all(uint8_t a) { return (VB){0} + (int8_t)a; }
INLINE VB b_field(VB b, int shift, VB mask) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  return (VB)((Bytes)b >> (uint8_t)shift) & mask;
}
INLINE VB b_minus(VB a, VB b) { return a - b; }
INLINE VB b_flip(VB b, uint8_t a) { return b ^ b_all(a); }
INLINE VB b_word(const void *p) { int32_t a; __builtin_memcpy(&a, p, 4); return (VB)(VI){a, a, a, a}; }
INLINE VI i_load(const int32_t *p) { return (VI){p[0], p[1], p[2], p[3]}; }
INLINE void i_store(int32_t *p, VI a) { __builtin_memcpy(p, &a, sizeof a); }
INLINE VI i_zero(void) { return (VI){0}; }
INLINE VI i_add(VI a, VI b) { return a + b; }
INLINE VI i_minus(VI a) { return -a; }
INLINE VF i_float(VI a) { return __builtin_convertvector(a, VF); }
#if defined(__ARM_FEATURE_DOTPROD)
INLINE VI i_dot8(VI sum, VB codes, VB x) { return (VI)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)x); }
#elif defined(__aarch64__)
INLINE VI i_dot8(VI sum, VB codes, VB x) {
  int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)codes), vget_low_s8((int8x16_t)x));
  int16x8_t high = vmull_s8(vget_high_s8((int8x16_t)codes), vget_high_s8((int8x16_t)x));
  return (VI)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)) + sum;
}
#else
INLINE VI i_dot8(VI sum, VB codes, VB x) {
  for (int i = 0; i < 16; ++i) sum[i / 4] += codes[i] * x[i];
  return sum;
}
#endif
INLINE VI i_dot(VI sum, VB codes, VB x) { return i_dot8(sum, codes, x); }
INLINE VI i_quad(VI sum, VB x, VB codes, int bits) { (void)bits; return i_dot8(sum, codes, x); }

#endif

#define BYTES (4 * LANES)

#if defined(__x86_64__)
#define KEEP(a) __asm__("" : "+v"(a))
#elif defined(__aarch64__)
#define KEEP(a) __asm__("" : "+w"(a))
#else
#define KEEP(a)
#endif

#endif
