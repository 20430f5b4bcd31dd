// Columns that are contiguous in memory, turned so that they lie along lanes.
#ifndef MPQ_COLUMNS_H
#define MPQ_COLUMNS_H

#include "lanes.h"

#if defined(MPQ_AVX512)
// to[j] is what rows have at j, words of 32 bits.
INLINE void b_transpose(VB w[16]) {
  VB pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) UNROLL for (int j = 0; j < 2; ++j) {
    fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + 2 + j]);
    fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + 2 + j]);
  }
  // fours[i + j] has words j, 4 + j, 8 + j, 12 + j of rows i to i + 3.
  for (int j = 0; j < 4; ++j) {
    VB a = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88), b = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
    VB c = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
    VB d = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
    w[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    w[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    w[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    w[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}
#endif

// Word j of columns `first` to `first + LANES - 1`, `last` standing for those behind it, in the lanes of to[j]. Columns
// are `bytes` long, zeros behind them, and begin `stride` bytes after one another.
INLINE void b_columns(VB to[LANES], const uint8_t *from, int64_t stride, int64_t first, int64_t last, int64_t bytes) {
#if defined(MPQ_AVX512)
  UNROLL for (int c = 0; c < LANES; ++c) {
    const uint8_t *column = from + (first + c < last ? first + c : last) * stride;
    to[c] = bytes < BYTES ? b_load_part(column, bytes) : b_load(column);
  }
  b_transpose(to);
#else
  uint32_t words[LANES][LANES];
  for (int c = 0; c < LANES; ++c) {
    const uint8_t *column = from + (first + c < last ? first + c : last) * stride;
    uint32_t row[LANES] = {0};
    __builtin_memcpy(row, column, bytes < BYTES ? bytes : BYTES);
    for (int j = 0; j < LANES; ++j) words[j][c] = row[j];
  }
  for (int j = 0; j < LANES; ++j) to[j] = b_load(words[j]);
#endif
}

#endif
