// One-dimensional optimal transport between the rows of two matrices of projections, row-major.
// Raw pointers and sizes only; who calls owns every buffer.
#pragma once

#include <stdint.h>

namespace fastloss {
namespace cpu {

template <class T>
struct SlicedKernels {
  // For each slice (row) s: cost[s] = W_p^p between the atoms x[s] (n,) and y[s] (m,), n, m < 2^31.
  // a (n,), b (m,): weights that sum to one; null for 1/n, 1/m.
  // If factor is not null, the rows are overwritten by factor[s] times the derivative of cost[s] in the atoms
  // (only those of x if want_x, of y if want_y); else they stay as they are.
  // f (slices, n) and g (slices, m), where not null, receive factor[s] times the dual potentials, each of mean zero
  // under its weights: the derivative of cost[s] in weights that are normalised afterwards.
  // A slice with NaN has cost, derivatives and potentials NaN.
  void (*transport)(T* x, T* y, int64_t slices, int64_t n, int64_t m, const double* a, const double* b, double p,
                    const double* factor, bool want_x, bool want_y, T* f, T* g, double* cost, void* scratch,
                    int threads);
  // sorted[s] = x[s] in ascending order and order[s] (int32) where each came from; stable, NaN throughout and the
  // identity for a row with NaN.
  void (*sort)(const T* x, int64_t slices, int64_t n, T* sorted, int32_t* order, void* scratch, int threads);
  // Bytes of scratch for rows of n and m atoms.
  int64_t (*scratch_bytes)(int64_t n, int64_t m, int threads);
};

}  // namespace cpu
}  // namespace fastloss
