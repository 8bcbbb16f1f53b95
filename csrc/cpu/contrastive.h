// Epilogues of the contrastive family on one tile of similarities, c (rows, cols), row-major with leading
// dimension cols. Raw pointers and sizes only; who calls owns every buffer.
//
// A direction is "rows" (statistics over the columns of each row) or "cols". Logits are in base 2:
// z_ij = row_scale[i] * c_ij in the row direction, col_scale[j] * c_ij in the column direction.
#pragma once

#include <stdint.h>

namespace fastloss {
namespace cpu {

// Which pairs of a tile are left out of every sum.
struct Mask {
  int64_t diagonal;        // pair (i, i + diagonal) is left out; kNoDiagonal for none
  const int64_t* row_ids;  // (rows,) and (cols,): pairs with equal ids are left out; both null for none
  const int64_t* col_ids;
};
constexpr int64_t kNoDiagonal = INT64_MIN;

// Rows handled together by one thread; fixes the split of the work, so results do not depend on the thread count.
constexpr int64_t kChunk = 32;

// One value for all rows (or columns), or one each. Null values: the direction is absent.
template <class T>
struct Scale {
  const T* values;
  bool single;
};

template <class T>
struct ContrastiveKernels {
  // Online log-sum-exp: (row_max, row_sum) (rows,) hold max z, rounded to an integer, and sum 2^(z - max) of what was
  // seen so far, and are updated; likewise (col_max, col_sum) (cols,) unless col_scale is absent. Start from (-inf, 0).
  // partials: scratch of 2 * ceil(rows / kChunk) * cols, unused (may be null) without columns.
  void (*lse_tile)(const T* c, int64_t rows, int64_t cols, Scale<T> row_scale, Scale<T> col_scale, Mask mask,
                   T* row_max, T* row_sum, T* col_max, T* col_sum, T* partials, int threads);

  // g_ij = row_weight[i] * P_ij + col_weight[j] * R_ij with the exponentials that lse_tile summed,
  // P_ij = 2^(row_scale[i] c_ij - row_shift[i]), R_ij = 2^(col_scale[j] c_ij - col_shift[j]); 0 where masked.
  // Shifts are integers: the final maxima (0 for infinite ones); whoever calls divides the weights by the sums.
  // g may be c. If row_dot is not null, row_dot[i] += sum_j P_ij c_ij, and col_dot[j] += sum_i R_ij c_ij
  // (partials: scratch of ceil(rows / kChunk) * cols). Column arguments are null without columns.
  void (*grad_tile)(const T* c, T* g, int64_t rows, int64_t cols, Scale<T> row_scale, const T* row_shift,
                    const T* row_weight, Scale<T> col_scale, const T* col_shift, const T* col_weight, Mask mask,
                    T* row_dot, T* col_dot, T* partials, int threads);

  // Between the passes, for pairs (i, i) left out of the sums: from the final (max, sum) (directions, n), with
  // x = ln(sum) + ln(2) max - scale c_ii for the natural scale, total = sum softplus(x) / directions; and for grad_tile
  // the shift, factor = sigmoid(x) / directions / sum, weight = factor * scale, all (directions, n); and the sum of
  // sigmoid(x) / directions over the directions, slope (n,). Empty sums: factor 0. A positive of +inf: NaN.
  void (*turn)(const T* max, const T* sum, Scale<T> scale, const T* diagonal, int64_t n, int directions, T* shift,
               T* weight, T* factor, T* slope, T* total);

  // One over the lengths of the rows x (rows, dim), at least eps; 0 for rows of zeros.
  void (*inverse_norms)(const T* x, int64_t rows, int64_t dim, int64_t stride, T eps, T* out, int threads);

  // grad (rows, dim), with respect to rows `unit` of length one, becomes that with respect to unit / inverse.
  void (*through_norms)(T* grad, const T* unit, const T* inverse, int64_t rows, int64_t dim, T eps, int threads);
};

}  // namespace cpu
}  // namespace fastloss
