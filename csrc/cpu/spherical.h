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
};

}  // namespace cpu
}  // namespace fastloss
