// The matmul, written once over the vectors of lanes.h and compiled once for every instruction set.
//
// A row of bytes holds segment f * stride + i in field f. For a block of columns: for every row of bytes, field and
// column, the segment's codes meet its activations in a vector of partial sums for each token, which the group's scale
// adds into another one; at the end lanes are added up. Every column is summed in one order, whoever computes it, so
// results do not depend on threads. Tokens go in tiles of 8, 4, 2 and 1; each reads the weight again, while it is near.
//
// Rounded activations: codes of few bits are multiplied as they are stored, unsigned; `prepare` computes what their
// offset adds to every lane, once, and sums start at the negative of it. Lanes are exact int32, made float32 one by one.
#include "problem.h"
#include "lanes.h"

#define COLUMNS 64  // of a block: so many short segments are long enough to read ahead, and sums stay in a cache
#define NEAR_BYTES 16384  // activations that are multiplied with all columns of a block before the next ones
#define TILE 8

// A segment's activations of one tile in scratch memory: vectors of token 0 to M - 1, the same of the next vector of k,
// and so on, filled up with zeros. With rounded ones M vectors of int32 precede them.
typedef struct {
  int64_t vectors, segments, segment_bytes;  // vectors of k in a segment; bytes of one token's segment
} Shape;

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t tile_of(int64_t tokens) { return tokens >= 8 ? 8 : tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1; }

INLINE Shape shape_of(const Problem *p) {
  int64_t width = p->q ? BYTES : LANES, vectors = (p->segment + width - 1) / width;
  Shape s = {vectors, p->stride * (8 / p->bits), (vectors + (p->q ? 1 : 0)) * (int64_t)sizeof(VF)};
  return s;
}

static int64_t scratch_bytes(const Problem *p) {
  Shape s = shape_of(p);
  return p->m * s.segments * s.segment_bytes;
}

INLINE const uint8_t *bytes_of(const Problem *p, int64_t i, int64_t column) {
  return p->codes + (i * p->n + column) * p->segment;
}

INLINE VF code_values(VD d, int bits, int shift, Table table) {
  return bits == 8 ? d_signed(d, 0) : d_look_up(d, shift, table);
}

// sums[t] += scale * (codes of one field of one column's bytes) . (activations of M tokens, as `Shape` says)
INLINE void add_floats(int64_t size, const uint8_t *codes, const float *x, VF scale, int bits, int shift, Table table,
                       const int M, const int chains, VF *sums) {
  VF part[4][TILE];
  UNROLL for (int c = 0; c < chains; ++c) UNROLL for (int t = 0; t < M; ++t) part[c][t] = f_zero();
  int64_t k = 0;
  for (; k + chains * LANES <= size; k += chains * LANES, x += chains * M * LANES)
    UNROLL for (int c = 0; c < chains; ++c) {
      VF w = code_values(d_load(codes + k + c * LANES), bits, shift, table);
      UNROLL for (int t = 0; t < M; ++t) part[c][t] = f_fma(w, f_load(x + (c * M + t) * LANES), part[c][t]);
    }
  for (; k < size; k += LANES, x += M * LANES) {
    int64_t rest = size - k;
    VF w = code_values(rest >= LANES ? d_load(codes + k) : d_load_part(codes + k, rest), bits, shift, table);
    UNROLL for (int t = 0; t < M; ++t) part[0][t] = f_fma(w, f_load(x + t * LANES), part[0][t]);
  }
  UNROLL for (int t = 0; t < M; ++t) {
    UNROLL for (int c = 1; c < chains; ++c) part[0][t] = f_add(part[0][t], part[c][t]);
    sums[t] = f_fma(part[0][t], scale, sums[t]);
  }
}

// The same of rounded activations; `start` are the sums to begin with, null for zeros.
INLINE void add_integers(int64_t size, const uint8_t *codes, const int8_t *q, VF scale, int bits, int shift, VB mask,
                         const int M, VF *sums, const int8_t *start) {
  VI part[TILE];
  UNROLL for (int t = 0; t < M; ++t) part[t] = start ? i_load((const int32_t *)(start + t * BYTES)) : i_zero();
  for (int64_t k = 0; k < size; k += BYTES, q += M * BYTES) {
    int64_t rest = size - k;
    VB stored = rest >= BYTES ? b_load(codes + k) : b_load_part(codes + k, rest);
    VB w = bits == 8 ? b_flip(stored, FLIP) : b_field(stored, shift, mask);
    UNROLL for (int t = 0; t < M; ++t) {
      VB x = b_load(q + t * BYTES);
      part[t] = bits == 8 ? i_dot8(part[t], w, x) : i_dot(part[t], w, x);
    }
  }
  UNROLL for (int t = 0; t < M; ++t) sums[t] = f_fma(i_float(part[t]), scale, sums[t]);
}

// `y[token : token + M, first : last]`, at most COLUMNS of them.
INLINE void block(const Problem *p, int64_t first, int64_t last, int64_t token, int bits, int integer, const int M) {
  const Shape s = shape_of(p);
  const char *x = (const char *)p->scratch + token * s.segments * s.segment_bytes;
  const int64_t step = p->scale_columns > 1, near = NEAR_BYTES / M / (integer ? 1 : 4);
  VF sums[COLUMNS][M];
  for (int64_t n = first; n < last; ++n) UNROLL for (int t = 0; t < M; ++t) sums[n - first][t] = f_zero();
  Table table = t_load(p->levels);
  VB mask = b_all((uint8_t)((1 << bits) - 1));
  for (int64_t i = 0; i < p->stride; ++i)
    for (int f = 0; f < 8 / bits; ++f) {
      const int64_t segment = f * p->stride + i, group = p->groups == 1 ? 0 : segment;
      if (group >= p->groups) continue;  // it only fills bytes
      const char *start = x + segment * M * s.segment_bytes, *from = start + (integer ? M * sizeof(VF) : 0);
      const float *scales = p->scales + group * p->scale_columns;
      for (int64_t k = 0; k < p->segment; k += near, from += NEAR_BYTES)
        for (int64_t n = first; n < last; ++n) {
          const uint8_t *codes = bytes_of(p, i, n) + k;
          const int64_t size = min(near, p->segment - k);
          VF scale = f_all(scales[n * step]), *sum = sums[n - first];
          const uint8_t *ahead = k + near < p->segment ? codes + near : codes - k + p->n * p->segment;
          for (int64_t b = 0; f == 0 && b < size; b += 64) __builtin_prefetch(ahead + b);
          if (integer)
            add_integers(size, codes, (const int8_t *)from, scale, bits, f * bits, mask, M, sum, k ? 0 : (const int8_t *)start);
          else if (M > 2 || size < 8 * LANES)  // else one chain of additions is slow on its own
            add_floats(size, codes, (const float *)from, scale, bits, f * bits, table, M, 1, sum);
          else
            add_floats(size, codes, (const float *)from, scale, bits, f * bits, table, M, 4 / M, sum);
        }
    }
  for (int64_t n = first; n < last; ++n)
    UNROLL for (int t = 0; t < M; ++t) p->y[(token + t) * p->n + n] = f_sum(sums[n - first][t]);
}

#define WIDTHS(M)                                                     \
  if (p->bits == 8) block(p, first, last, token, 8, integer, M);      \
  else if (p->bits == 4) block(p, first, last, token, 4, integer, M); \
  else block(p, first, last, token, 2, integer, M)

#define TILES(NAME, INTEGER)                                                                              \
  static void NAME(const Problem *p, int64_t first, int64_t last, int64_t token, int64_t tokens) {       \
    const int integer = INTEGER;                                                                         \
    if (tokens == 8) { WIDTHS(8); } else if (tokens == 4) { WIDTHS(4); } else if (tokens == 2) { WIDTHS(2); } \
    else { WIDTHS(1); }                                                                                  \
  }
TILES(floats, 0)
TILES(integers, 1)

static void multiply(const Problem *p, Part part, void *own) {
  (void)own;
  for (int64_t first = part.column; first < part.columns_end; first += COLUMNS)
    for (int64_t token = 0, tokens; token < p->m; token += tokens) {
      tokens = tile_of(p->m - token);
      (p->q ? integers : floats)(p, first, min(first + COLUMNS, part.columns_end), token, tokens);
    }
}

static void prepare(const Problem *p) {
  const int offset = p->bits == 8 ? FLIP : 1 << (p->bits - 1);
  const Shape s = shape_of(p);
  const int64_t row = s.segments * p->segment;
  for (int64_t token = 0, tokens; token < p->m; token += tokens) {
    tokens = tile_of(p->m - token);
    for (int64_t i = 0; i < s.segments * tokens; ++i) {
      int64_t segment = i / tokens, t = i % tokens, from = (token + t) * row + segment * p->segment;
      char *to = (char *)p->scratch + ((token * s.segments + segment * tokens) * s.segment_bytes) + t * sizeof(VF);
      if (p->q) {
        VI sum = i_zero();
        for (int64_t k = 0; k < p->segment; k += BYTES) {
          int64_t rest = p->segment - k;
          VB x = rest >= BYTES ? b_load(p->q + from + k) : b_load_part(p->q + from + k, rest);
          if (offset) sum = i_dot(sum, b_all((uint8_t)offset), x);
          b_store(to + (k / BYTES + 1) * tokens * sizeof(VF), x);
        }
        i_store((int32_t *)to, i_minus(sum));
      } else {
        for (int64_t k = 0; k < p->segment; k += LANES) {
          int64_t rest = p->segment - k;
          VF x = rest >= LANES ? f_load(p->x + from + k) : f_load_part(p->x + from + k, rest);
          f_store((float *)(to + k / LANES * tokens * sizeof(VF)), x);
        }
      }
    }
  }
}

static int supported(void) { return SUPPORTED; }

#define STRING_(a) #a
#define STRING(a) STRING_(a)
extern const Way JOIN(mpq_many, ISA);
extern const Kernel JOIN(mpq_kernel, ISA);
const Kernel JOIN(mpq_kernel, ISA) = {
    STRING(ISA), supported, {scratch_bytes, prepare, 0, multiply}, &JOIN(mpq_many, ISA), MANY};
