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

// A kernel for one instruction set: which machines have it; what it does once, with so many bytes of scratch memory;
// and columns `first` to `last` of `y`.
typedef struct {
  const char *name;
  int (*supported)(void);
  int64_t (*scratch_bytes)(const Problem *);
  void (*prepare)(const Problem *);
  void (*columns)(const Problem *, int64_t first, int64_t last);
} Kernel;

#ifdef __cplusplus
}
#endif
#endif
