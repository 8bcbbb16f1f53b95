// Statistics of the rows of a matrix of logits, and the gradient of any loss that is a function of them.
// Raw pointers and sizes only; who calls owns every buffer. Rows are contiguous, `stride` elements apart.
#pragma once

#include <stdint.h>

namespace fastloss {
namespace cpu {

// Columns handled together by one thread; fixes the split of the work, so results do not depend on the thread count.
constexpr int64_t kSphericalChunk = 65536;

template <class T>
struct SphericalKernels {
  // Of each row: the mean as a sum of two numbers, high[i] + low[i], which together hold it to twice the digits of T
  // (float) or to those of T (double); square[i] = sum_j (x_ij - mean_i)^2; centred[i] = x_it - mean_i and
  // logit[i] = x_it with t = target[i], both 0 for t < 0. cols >= 1.
  // partials: scratch of 2 * rows * ceil(cols / kSphericalChunk) doubles.
  void (*moments)(const T* x, int64_t stride, int64_t rows, int64_t cols, const int64_t* target, T* high, T* low,
                  T* square, T* centred, T* logit, double* partials, int threads);

  // g_ij = shift[i] + scale[i] ((x_ij - high[i]) - low[i]) + (j == target[i] ? spike[i] : 0). g may be x.
  // A row whose three factors are 0 is written without being read.
  void (*gradient)(const T* x, int64_t x_stride, T* g, int64_t g_stride, int64_t rows, int64_t cols,
                   const int64_t* target, const T* high, const T* low, const T* shift, const T* scale, const T* spike,
                   int threads);

  // The rows of a factored layer's step (fastloss/spherical/factored.py): d numbers each, contiguous, `pairs` targets a
  // row of hidden. In order: t = rows . hidden, square = max(0, product . hidden), mean = hidden . mean_row;
  void (*factored_statistics)(const T* rows, const T* product, const T* hidden, const T* mean_row, int64_t n,
                              int64_t pairs, int64_t d, T* t, T* square, T* mean, int threads);
  // weighted = sum_k g_t rows, gradient = weighted + 2 g_v product + g_mean mean_row;
  void (*factored_gradient)(const T* rows, const T* product, const T* mean_row, const T* g_t, const T* g_v,
                            const T* g_mean, int64_t n, int64_t pairs, int64_t d, T* weighted, T* gradient,
                            int threads);
  // scaled = D hidden, half = D product / 2 - lr weighted, full = shrink (D product - lr weighted), D = -2 lr g_v;
  void (*factored_factors)(const T* hidden, const T* product, const T* weighted, const T* g_v, T lr, T shrink,
                           int64_t n, int64_t d, T* scaled, T* half, T* full, int threads);
  // x = x D + lr^2/2 [target_i = target_j] g_t_i g_t_j - lr^2/(2 classes) g_t_i g_t_j, (n, n), for one target a row;
  void (*factored_pairs)(T* x, const int64_t* target, const T* g_t, const T* g_v, T lr, T classes, int64_t n);
  // x = (shrink I + x D)^-1, (n, n), by Gauss-Jordan elimination with row pivots; false, x lost, where a pivot is 0 or
  // NaN. order: scratch of n.
  bool (*factored_inverse)(T* x, const T* g_v, T lr, T shrink, int64_t n, int64_t* order);
  // the largest |solution| / |hidden| of a row (0 for rows of zeros, infinity for NaN);
  T (*factored_growth)(const T* solution, const T* hidden, int64_t n, int64_t d);
  // v[target] -= lr g_t solution, pair after pair in every column.
  void (*factored_scatter)(T* v, const int64_t* target, const T* g_t, const T* solution, T lr, int64_t n, int64_t pairs,
                           int64_t d, int threads);

  // x = scale x + (change + change^T) for n rows of n: symmetric to the last bit when x is. Rows are n elements apart.
  void (*symmetric_update)(T* x, const T* change, int64_t n, T scale, int threads);
};

}  // namespace cpu
}  // namespace fastloss
