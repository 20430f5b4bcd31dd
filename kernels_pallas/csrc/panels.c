// Many tokens: the weight is unpacked once for a block of columns and of k, in the order in which it is then read.
//
// A slab is what one block of columns has of some rows of bytes, all their fields. It is unpacked into panels of WIDE
// columns, each a run of pieces, one for each segment in the slab, and stays in the second cache while tile after tile
// of tokens is multiplied with it. What a tile and a slab share of the activations is copied together, once for all
// columns, and is in the first cache while it is used. Sums of a tile of tokens and columns are in registers, columns
// along lanes, and go to `y` between slabs. So unpacking costs as much as a few tokens, and the memory is one slab's
// panels for each thread, and the activations once more; but where one part has all columns nothing is read twice, and of
// short rows most of that memory would be unused: there a thread copies a tile when it comes to it.
//
// Floats: a piece is rows of WIDE values, code times scale. Rounded activations: the scales, what sums start with, and
// words of 4 codes along k in a lane. `i_quad` may want activations with an offset: sums then start at the negative of
// what that adds, which is the same for all tokens. A piece's sum is exact in int32, then made float32 and scaled.
//
// Every output is summed in one order, whatever its tile and thread.
#include "columns.h"
#include "problem.h"

#define VECTORS 2  // of columns in a tile
#define WIDE (VECTORS * LANES)
#define PANELS 8   // of a block of columns
#define ROWS 512   // of a panel of floats
#define WORDS 528  // along k of a panel of integers, the two headers of each piece counted in
#define PANEL (WORDS * VECTORS)     // vectors of a panel, of either kind
#define STRIDE (4 * WORDS + BYTES)  // bytes of a token's activations in a tile, with room to write behind them

typedef struct {
  int64_t row, rows;    // of bytes
  int64_t byte, bytes;  // of each segment in them
} Slab;

// Of a tile. Sums of integers are two vectors, those of a piece and of all, so theirs are half as large.
INLINE int64_t tile_tokens(const Problem *p) { return p->q ? TOKENS / 2 : TOKENS; }

INLINE int64_t words_of(int64_t bytes) { return up(bytes, 4); }

// Which group's scale a segment has; -1 if it only fills bytes.
INLINE int64_t group_of(const Problem *p, int64_t segment) {
  return p->groups == 1 ? 0 : segment < p->groups ? segment : -1;
}

// The largest slabs that fit: `rows` whole rows of bytes, or a part of one row.
static Slab largest_slab(const Problem *p) {
  const int64_t fields = 8 / p->bits, room = p->q ? WORDS : ROWS;
  const int64_t most = (p->q ? 4 * (room / fields - 2) : room / fields) / BYTES * BYTES;
  Slab s = {0, 1, 0, min(p->segment, most)};
  if (s.bytes == p->segment) {
    int64_t rows = room / (fields * (p->q ? words_of(s.bytes) + 2 : s.bytes));
    s.rows = rows < 1 ? 1 : rows;
  }
  return s;
}

static int64_t slabs_of(const Problem *p) {
  const Slab most = largest_slab(p);
  return up(p->stride, most.rows) * up(p->segment, most.bytes);
}

// Whether activations are copied ahead.
static int shared(const Problem *p) {
  const int64_t row = 8 / p->bits * p->stride * p->segment * (p->q ? 1 : (int64_t)sizeof(float));
  return p->n > PART_COLUMNS && 2 * row >= slabs_of(p) * STRIDE;
}

// Slab `number` in the order in which they are multiplied.
static Slab slab_at(const Problem *p, int64_t number) {
  const Slab most = largest_slab(p);
  const int64_t in_row = up(p->segment, most.bytes);
  const int64_t row = number / in_row * most.rows, byte = number % in_row * most.bytes;
  Slab s = {row, min(most.rows, p->stride - row), byte, min(most.bytes, p->segment - byte)};
  return s;
}

// Of LANES columns, of which `count` are there.
INLINE VF scales_of(const Problem *p, int64_t group, int64_t column, int64_t count) {
  const float *from = p->scales + group * p->scale_columns;
  if (p->scale_columns == 1) return f_all(*from);
  __builtin_prefetch(from + column + WIDE);
  return count <= 0 ? f_zero() : count < LANES ? f_load_part(from + column, count) : f_load(from + column);
}

// One panel: `count` columns from `first`. Columns behind them are unpacked as the last one is, and never looked at.
INLINE void unpack(const Problem *p, const Slab s, int64_t first, int64_t count, VB *to, const int bits,
                   const int integer) {
  const int64_t words = words_of(s.bytes), header = integer ? 2 * VECTORS : 0;
  const Table table = t_load(p->levels);
  const VB mask = b_all((uint8_t)((1 << bits) - 1)), offset = b_all(1 << (bits - 1)), flip = b_all(X_FLIP);
  for (int64_t i = s.row; i < s.row + s.rows; ++i) {
    VB *piece[4];
    int64_t group[4];
    UNROLL for (int f = 0; f < 8 / bits; ++f) {
      group[f] = group_of(p, f * p->stride + i);
      piece[f] = to;
      if (group[f] >= 0) to += header + (integer ? words : s.bytes) * VECTORS;
    }
    for (int v = 0; v < VECTORS; ++v) {
      const uint8_t *from = p->codes + (i * p->n + first) * p->segment + s.byte;
      VF scale[4];
      VI start[4];
      UNROLL for (int f = 0; f < 8 / bits; ++f) {
        start[f] = i_zero();
        scale[f] = group[f] < 0 ? f_zero() : scales_of(p, group[f], first + v * LANES, count - v * LANES);
      }
      for (int64_t w = 0; w < words; w += LANES) {
        VB word[LANES];
        const uint8_t *ahead = from + WIDE * p->segment + 4 * w;  // the next panel's, into the second cache
        UNROLL for (int c = 0; c < LANES; ++c) __builtin_prefetch(ahead + (v * LANES + c) * p->segment, 0, 2);
        b_columns(word, from + 4 * w, p->segment, v * LANES, count - 1, s.bytes - 4 * w);
        UNROLL for (int f = 0; f < 8 / bits; ++f) {
          if (group[f] < 0) continue;
          const int64_t rest = min(words - w, LANES);
          if (integer)
            for (int j = 0; j < rest; ++j) {
              VB codes = bits == 8 ? word[j] : b_minus(b_field(word[j], f * bits, mask), offset);
              b_store(piece[f] + header + (w + j) * VECTORS + v, codes);
              start[f] = i_quad(start[f], flip, codes, bits);
            }
          else
            for (int j = 0; j < rest; ++j)
              UNROLL for (int b = 0; b < 4; ++b) {
                int64_t k = 4 * (w + j) + b;
                if (k >= s.bytes) break;
                VD d = (VD)word[j];
                VF value = bits == 8 ? d_signed(d, 8 * b) : d_look_up(d, 8 * b + f * bits, table);
                f_store((float *)(piece[f] + k * VECTORS + v), f_mul(value, scale[f]));
              }
        }
      }
      if (integer) UNROLL for (int f = 0; f < 8 / bits; ++f) {
        if (group[f] < 0) continue;
        f_store((float *)(piece[f] + v), scale[f]);
        i_store((int32_t *)(piece[f] + VECTORS + v), i_minus(start[f]));
      }
    }
  }
}

// How many pieces a panel of the slab has.
static int64_t pieces_of(const Problem *p, const Slab s) {
  int64_t pieces = 0;
  for (int64_t i = s.row; i < s.row + s.rows; ++i)
    for (int64_t f = 0; f < 8 / p->bits; ++f) pieces += group_of(p, f * p->stride + i) >= 0;
  return pieces;
}

// Activations of some tokens that a slab meets, in the order of its pieces.
static void gather(const Problem *p, const Slab s, int64_t token, int64_t tokens, char *to) {
  const int64_t fields = 8 / p->bits, row = p->stride * fields * p->segment;
  for (int64_t i = s.row; i < s.row + s.rows; ++i)
    for (int64_t f = 0; f < fields; ++f) {
      const int64_t segment = f * p->stride + i;
      if (group_of(p, segment) < 0) continue;
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t at = (token + t) * row + segment * p->segment + s.byte;
        if (p->q)
          for (int64_t b = 0; b < s.bytes; b += BYTES) {
            const int8_t *from = p->q + at + b;
            VB x = s.bytes - b < BYTES ? b_load_part(from, s.bytes - b) : b_load(from);
            b_store(to + t * STRIDE + b, b_flip(x, X_FLIP));
          }
        else
          for (int64_t k = 0; k < s.bytes; k += LANES) {
            const float *from = p->x + at + k;
            VF x = s.bytes - k < LANES ? f_load_part(from, s.bytes - k) : f_load(from);
            f_store((float *)(to + t * STRIDE) + k, x);
          }
      }
      to += p->q ? 4 * words_of(s.bytes) : 4 * s.bytes;
    }
}

// Code for each token of a tile, with variables of its own: compilers keep those in registers, arrays in memory.
#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

// A tile of tokens and one panel, of whose columns `count` are there; `begin`: `y` has nothing yet to add to.
typedef struct {
  const Problem *problem;
  const VB *panel;
  const char *x;
  int64_t pieces, bytes, token, tokens, column, count;
  int begin;
} Tile;

INLINE void add_row(const Tile *a, int64_t t, VF left, VF right) {
  float part[WIDE], *y = a->problem->y + (a->token + t) * a->problem->n + a->column, *to = y;
  if (a->count < WIDE) to = a->begin ? part : __builtin_memcpy(part, y, a->count * sizeof(float));
  f_store(to, a->begin ? left : f_add(f_load(to), left));
  f_store(to + LANES, a->begin ? right : f_add(f_load(to + LANES), right));
  if (a->count < WIDE) __builtin_memcpy(y, part, a->count * sizeof(float));
}

// Reads ahead where `add_row` will write.
INLINE void expect_rows(const Tile *a) {
  const float *y = a->problem->y + a->token * a->problem->n + a->column;
  for (int64_t t = 0; t < a->tokens; ++t, y += a->problem->n)
    UNROLL for (int i = 0; i < WIDE; i += 16) __builtin_prefetch(y + i, 1);
}

#define SUMS(t) VF left##t = f_zero(), right##t = f_zero();
#define FINISH(t) if (t < M && t < a->tokens) add_row(a, t, left##t, right##t);

// Adds what at most M tokens make of floats to `y`.
INLINE void floats(const Tile *a, const int M) {
#define STEP(t)                                       \
  if (t < M) {                                        \
    VF one = f_all(*(const float *)(x + t * STRIDE)); \
    left##t = f_fma(one, left, left##t);              \
    right##t = f_fma(one, right, right##t);           \
  }
  const float *w = (const float *)a->panel;
  const char *x = a->x;
  expect_rows(a);
  EACH(SUMS)
  for (int64_t k = a->pieces * a->bytes; k > 0; --k, w += WIDE, x += sizeof(float)) {
    VF left = f_load(w), right = f_load(w + LANES);
    EACH(STEP)
  }
  EACH(FINISH)
#undef STEP
}

// The same of rounded activations.
INLINE void integers(const Tile *a, const int M, const int bits) {
#define START(t) VI l##t = start, r##t = right_start;
#define STEP(t)                         \
  if (t < M) {                          \
    VB one = b_word(x + t * STRIDE);    \
    l##t = i_quad(l##t, one, l, bits);  \
    r##t = i_quad(r##t, one, r, bits);  \
    KEEP(l##t);                         \
    KEEP(r##t);                         \
  }
#define ADD(t)                                              \
  if (t < M) {                                              \
    left##t = f_fma(i_float(l##t), scale, left##t);         \
    right##t = f_fma(i_float(r##t), right_scale, right##t); \
    KEEP(left##t);                                          \
    KEEP(right##t);                                         \
  }
  const VB *w = a->panel;
  const char *x = a->x;
  expect_rows(a);
  EACH(SUMS)
  for (int64_t piece = 0; piece < a->pieces; ++piece) {
    VF scale = f_load((const float *)w), right_scale = f_load((const float *)(w + 1));
    VI start = i_load((const int32_t *)(w + 2)), right_start = i_load((const int32_t *)(w + 3));
    EACH(START)
    w += 2 * VECTORS;
    for (int64_t k = words_of(a->bytes); k > 0; --k, w += VECTORS, x += 4) {
      VB l = b_load(w), r = b_load(w + 1);
      EACH(STEP)
    }
    EACH(ADD)
  }
  EACH(FINISH)
}

typedef void Unpack(const Problem *, Slab, int64_t first, int64_t count, VB *to);
#define UNPACK(NAME, BITS, INTEGER)                                                        \
  static void NAME(const Problem *p, Slab s, int64_t first, int64_t count, VB *to) {       \
    unpack(p, s, first, count, to, BITS, INTEGER);                                         \
  }
UNPACK(unpack_floats2, 2, 0)
UNPACK(unpack_floats4, 4, 0)
UNPACK(unpack_floats8, 8, 0)
UNPACK(unpack_integers2, 2, 1)
UNPACK(unpack_integers4, 4, 1)
UNPACK(unpack_integers8, 8, 1)

typedef void Add(const Tile *);
#define TILE(NAME, CALL) \
  static void NAME(const Tile *a) { CALL; }
TILE(floats_third, floats(a, TOKENS / 3))
TILE(floats_two_thirds, floats(a, TOKENS / 3 * 2))
TILE(floats_all, floats(a, TOKENS))
TILE(few_bits_third, integers(a, TOKENS / 6, 4))
TILE(few_bits_two_thirds, integers(a, TOKENS / 3, 4))
TILE(few_bits_all, integers(a, TOKENS / 2, 4))
TILE(bytes_third, integers(a, TOKENS / 6, 8))
TILE(bytes_two_thirds, integers(a, TOKENS / 3, 8))
TILE(bytes_all, integers(a, TOKENS / 2, 8))

// One slab, of columns `first` to `last`, for all tokens of a part; `x`: of its first tile, others `x_stride` bytes on,
// where activations are shared, and room for a tile behind the panels where they are not.
static void multiply_slab(const Problem *p, Part part, int64_t first, int64_t last, Slab s, const char *x,
                          int64_t x_stride, VB *panels) {
  static Unpack *const unpackers[2][3] = {{unpack_floats2, unpack_floats4, unpack_floats8},
                                          {unpack_integers2, unpack_integers4, unpack_integers8}};
  static Add *const adders[3][3] = {{floats_third, floats_two_thirds, floats_all},
                                    {few_bits_third, few_bits_two_thirds, few_bits_all},
                                    {bytes_third, bytes_two_thirds, bytes_all}};
  Unpack *const unpack_one = unpackers[p->q != 0][p->bits / 4];
  Add *const *const add = adders[p->q ? 1 + (p->bits == 8) : 0];
  const int64_t most = tile_tokens(p), pieces = pieces_of(p, s);
  char *own = (char *)(panels + PANELS * PANEL);
  VB *panel = panels;
  for (int64_t n = first; n < last; n += WIDE, panel += PANEL) unpack_one(p, s, n, min(WIDE, last - n), panel);
  for (int64_t token = part.token, tokens; token < part.tokens_end; token += tokens) {
    tokens = min(most, part.tokens_end - token);
    const char *tile = x ? x + token / most * x_stride : own;
    if (!x) gather(p, s, token, tokens, own);
    Tile a = {p, panels, tile, pieces, s.bytes, token, tokens, first, 0, s.row + s.byte == 0};
    for (; a.column < last; a.column += WIDE, a.panel += PANEL) {
      a.count = min(WIDE, last - a.column);
      add[(3 * tokens - 1) / most](&a);
    }
  }
}

static void multiply(const Problem *p, Part part, void *own) {
  const int ahead = shared(p);
  const int64_t slabs = slabs_of(p), x_bytes = tile_tokens(p) * STRIDE;
  for (int64_t first = part.column; first < part.columns_end; first += PANELS * WIDE)
    for (int64_t i = 0; i < slabs; ++i) {
      const int64_t last = min(first + PANELS * WIDE, part.columns_end);
      const char *x = ahead ? (const char *)p->scratch + i * x_bytes : 0;
      multiply_slab(p, part, first, last, slab_at(p, i), x, slabs * x_bytes, own);
    }
}

static int64_t shared_bytes(const Problem *p) {
  return shared(p) ? up(p->m, tile_tokens(p)) * slabs_of(p) * tile_tokens(p) * STRIDE : 0;
}

static void prepare(const Problem *p) {
  const int64_t slabs = slabs_of(p), most = tile_tokens(p);
  char *to = (char *)p->scratch;
  if (!shared(p)) return;
  for (int64_t token = 0; token < p->m; token += most)
    for (int64_t i = 0; i < slabs; ++i, to += most * STRIDE)
      gather(p, slab_at(p, i), token, min(most, p->m - token), to);
}

extern const Way JOIN(mpq_many, ISA);
const Way JOIN(mpq_many, ISA) = {shared_bytes, prepare, PANELS * PANEL * sizeof(VB) + TOKENS * STRIDE, multiply};
