// Few tokens: the matmul, written once over the vectors of lanes.h and compiled once for every instruction set.
//
// A row of bytes holds segment f * stride + i in field f. For a block of columns: for every row of bytes, field and
// column, the segment's codes meet its activations in a vector of partial sums for each token, which the group's scale
// adds into another one; at the end lanes are added up. Every column is summed in one order, whoever computes it, so
// results do not depend on threads. Tokens go in tiles of 8, 4, 2 and 1; each reads the weight again, while it is near.
//
// Rounded activations: codes of few bits are multiplied as they are stored, unsigned; `prepare` computes what their
// offset adds to every lane, once, and sums start at the negative of it. Lanes are exact int32, each made float32.
#include "problem.h"
#include "lanes.h"

#define COLUMNS 256  // of a block, over tokens: enough to read short segments ahead, while sums stay in a cache
#define NEAR_BYTES 16384  // activations that are multiplied with all columns of a block before the next ones
#define TILE 8

// A segment's activations of one tile in scratch memory: vectors of token 0 to M - 1, the same of the next vector of k,
// and so on, filled up with zeros. With rounded ones M vectors of int32 precede them.
typedef struct {
  int64_t vectors, segments, segment_bytes;  // vectors of k in a segment; bytes of one token's segment
} Shape;

INLINE int64_t tile_of(int64_t tokens) { return tokens >= 8 ? 8 : tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1; }

INLINE Shape shape_of(const Problem *p) {
  int64_t vectors = up(p->segment, p->q ? BYTES : LANES);
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

// `size` bytes of a row, of C columns, the next `stride` further, and what G fields of them meet, from field `first`.
typedef struct {
  const uint8_t *codes;
  int64_t stride, size;
  int64_t ahead;           // bytes to those that are read soon
  const char *x, *start;   // activations of the first field, as `Shape` says, and sums to begin with, null for zeros
  int64_t x_stride;        // bytes to those of the next field
  const float *scales[4];  // of the first column, in each field
  int64_t scale_step;      // to the next column
} Operands;

// Code for each of C * G * M <= 8 sums, in variables of their own: compilers keep those in registers, arrays in memory.
#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define IS(j) ((j) < C * G * M)
#define COLUMN(j) ((j) / (G * M))
#define FIELD(j) ((j) / M % G)
#define TOKEN(j) ((j) % M)
#define FIRST(j) (FIELD(j) == 0 && TOKEN(j) == 0)
#define SUM(j) sums[COLUMN(j) * M + TOKEN(j)]
#define SCALE(j) f_all(a->scales[FIELD(j)][COLUMN(j) * a->scale_step])

// A column's codes of 8 bits lie as far apart as those that use the same lines of the first cache, so they wait in the
// second one.
INLINE const uint8_t *codes_of(const Operands *a, int column, int64_t k, int bits, int read_ahead) {
  const uint8_t *codes = a->codes + column * a->stride + k;
  if (read_ahead && bits == 8) __builtin_prefetch(codes + a->ahead, 0, 2);
  else if (read_ahead) __builtin_prefetch(codes + a->ahead);
  return codes;
}

INLINE VF code_values(const uint8_t *p, int64_t rest, int bits, int field, Table table) {
  if (bits == 8) return rest >= LANES ? d_bytes(p) : d_signed(d_load_part(p, rest), 0);
  return d_look_up(rest >= LANES ? d_load(p) : d_load_part(p, rest), field * bits, table);
}

// sums[column][token] += scale * (codes of a column and field) . (activations of a token there)
INLINE void add_floats(const Operands *a, int bits, int first, Table table, const int M, const int G, const int C,
                       VF *sums) {
#define START(j) VF part##j = f_zero();
#define STEP(j)                                                                                    \
  if (IS(j)) {                                                                                     \
    const uint8_t *codes = codes_of(a, COLUMN(j), k, bits, FIRST(j));                              \
    VF w = code_values(codes, a->size - k, bits, first + FIELD(j), table);                         \
    const float *x = (const float *)(a->x + FIELD(j) * a->x_stride) + k * M + TOKEN(j) * LANES;    \
    part##j = f_fma(w, f_load(x), part##j);                                                        \
    KEEP(part##j);                                                                                 \
  }
#define ADD(j) \
  if (IS(j)) SUM(j) = f_fma(part##j, SCALE(j), SUM(j));
  EACH(START)
  for (int64_t k = 0; k < a->size; k += LANES) { EACH(STEP) }
  EACH(ADD)
#undef START
#undef STEP
#undef ADD
}

// The same of rounded activations.
INLINE void add_integers(const Operands *a, int bits, int first, VB mask, const int M, const int G, const int C,
                         VF *sums) {
#define START(j)           \
  VI part##j = i_zero();   \
  if (IS(j) && a->start) part##j = i_load((const int32_t *)(a->start + FIELD(j) * a->x_stride + TOKEN(j) * BYTES));
#define STEP(j)                                                                                    \
  if (IS(j)) {                                                                                     \
    const uint8_t *codes = codes_of(a, COLUMN(j), k, bits, FIRST(j));                              \
    VB stored = a->size - k >= BYTES ? b_load(codes) : b_load_part(codes, a->size - k);            \
    VB w = bits == 8 ? b_flip(stored, FLIP) : b_field(stored, (first + FIELD(j)) * bits, mask);    \
    VB x = b_load(a->x + FIELD(j) * a->x_stride + k * M + TOKEN(j) * BYTES);                       \
    part##j = bits == 8 ? i_dot8(part##j, w, x) : i_dot(part##j, w, x);                            \
    KEEP(part##j);                                                                                 \
  }
#define ADD(j) \
  if (IS(j)) SUM(j) = f_fma(i_float(part##j), SCALE(j), SUM(j));
  EACH(START)
  for (int64_t k = 0; k < a->size; k += BYTES) { EACH(STEP) }
  EACH(ADD)
}

// `y[token : token + M, first : last]`, at most COLUMNS / M of them. Eight sums go on at once, of all tokens, of as
// many fields as that leaves, and of columns: none waits for another, and codes and activations are read less often.
INLINE void block(const Problem *p, int64_t first, int64_t last, int64_t token, int bits, int integer, const int M) {
  const Shape s = shape_of(p);
  const int fields = 8 / bits, G = fields * M <= TILE ? fields : TILE / M, C = M * G < 2 ? 4 : TILE / (M * G);
  const char *x = (const char *)p->scratch + token * s.segments * s.segment_bytes;
  const int64_t step = p->scale_columns > 1, near = NEAR_BYTES / M / G / (integer ? 1 : 4);
  VF sums[COLUMNS];  // of the first column's tokens, the next one's, and so on
  for (int64_t t = 0; t < (last - first) * M; ++t) sums[t] = f_zero();
  Table table = t_load(p->levels);
  VB mask = b_all((uint8_t)((1 << bits) - 1));
  for (int64_t i = 0; i < p->stride; ++i)
    UNROLL for (int f = 0; f < fields; f += G) {
      const char *start = x + (f * p->stride + i) * M * s.segment_bytes, *from = start + (integer ? M * sizeof(VF) : 0);
      for (int64_t k = 0; k < p->segment; k += near, from += NEAR_BYTES / G) {
        Operands a = {.stride = p->segment, .size = min(near, p->segment - k), .scale_step = step};
        a.x = from;
        a.x_stride = p->stride * M * s.segment_bytes;
        a.start = integer && k == 0 ? start : 0;
        if (f == 0)
          a.ahead = k + near < p->segment ? near : i + 1 < p->stride ? p->n * p->segment - k : C * p->segment;
        a.codes = bytes_of(p, i, first) + k;
        // Segments that only fill bytes meet zeros, whatever their scale.
        UNROLL for (int g = 0; g < G; ++g)
          a.scales[g] = p->scales + min((f + g) * p->stride + i, p->groups - 1) * p->scale_columns + first * step;
        VF *to = sums;
        int64_t n = first;
        for (; n + C <= last; n += C, to += C * M) {
          UNROLL for (int g = 0; g < G; ++g) __builtin_prefetch(a.scales[g] + p->scale_columns);  // the next row's
          if (integer) add_integers(&a, bits, f, mask, M, G, C, to);
          else add_floats(&a, bits, f, table, M, G, C, to);
          a.codes += C * p->segment;
          UNROLL for (int g = 0; g < G; ++g) a.scales[g] += C * step;
        }
        for (a.stride = a.scale_step = 0; n < last; ++n, to += M) {  // the rest, one column as if it were all of them
          VF spare[TILE];
          UNROLL for (int t = 0; t < TILE; ++t) spare[t] = t < M ? to[t] : f_zero();
          if (integer) add_integers(&a, bits, f, mask, M, G, C, spare);
          else add_floats(&a, bits, f, table, M, G, C, spare);
          UNROLL for (int t = 0; t < M; ++t) to[t] = spare[t];
          a.codes += p->segment;
          UNROLL for (int g = 0; g < G; ++g) a.scales[g] += step;
        }
      }
    }
  for (int64_t n = first; n < last; ++n)
    UNROLL for (int t = 0; t < M; ++t) p->y[(token + t) * p->n + n] = f_sum(sums[(n - first) * M + t]);
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
  const int64_t step = COLUMNS / tile_of(p->m);
  for (int64_t first = part.column; first < part.columns_end; first += step)
    for (int64_t token = 0, tokens; token < p->m; token += tokens) {
      tokens = tile_of(p->m - token);
      (p->q ? integers : floats)(p, first, min(first + step, part.columns_end), token, tokens);
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

// Short segments leave vectors along k half empty, and columns have no such ends.
static int64_t least(const Problem *p) {
  return p->q ? MANY_OF_BYTES : p->segment < 4 * LANES ? MANY_OF_FLOATS / 2 : MANY_OF_FLOATS;
}

#define STRING_(a) #a
#define STRING(a) STRING_(a)
extern const Way JOIN(mpq_many, ISA);
extern const Kernel JOIN(mpq_kernel, ISA);
const Kernel JOIN(mpq_kernel, ISA) = {
    STRING(ISA), supported, least, {scratch_bytes, prepare, 0, multiply}, &JOIN(mpq_many, ISA)};
