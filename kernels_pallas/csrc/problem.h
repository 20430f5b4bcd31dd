// One matmul of `m` tokens with a weight of layout `cpu` (layouts.py), as the kernels take it.
#ifndef MPQ_PROBLEM_H
#define MPQ_PROBLEM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const float *x;        // [m, segments * segment]; null if activations are rounded
  const int8_t *q;       // the same, rounded; null if not
  const uint8_t *codes;  // [stride, n, segment]
  const float *scales;   // [groups, scale_columns]
  const float *levels;   // [16], the value of each code; of 8 bits unused
  float *y;              // [m, n]
  int64_t m, n, segment, stride, groups, scale_columns;
  int bits;
  void *scratch;         // activations in the order in which they are read, see `prepare`
} Problem;

#define PART_COLUMNS 64  // columns of a part are a multiple, or all

// A part of `y` that one thread computes.
typedef struct {
  int64_t column, columns_end, token, tokens_end;
} Part;

// One way to multiply: what is done once, with so many bytes of scratch memory; and a part of `y`, with so many bytes
// of the thread's own.
typedef struct {
  int64_t (*shared_bytes)(const Problem *);
  void (*prepare)(const Problem *);
  int64_t own_bytes;
  void (*multiply)(const Problem *, Part, void *own);
} Way;

// The ways of one instruction set, and which machines have it. `few` takes all tokens in every part.
typedef struct {
  const char *name;
  int (*supported)(void);
  int64_t (*least)(const Problem *);  // tokens for which `many` is the faster one
  Way few;
  const Way *many;
} Kernel;

#ifdef __cplusplus
}
#endif
#endif
