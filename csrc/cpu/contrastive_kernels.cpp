// Compiled once per instruction set, with FASTLOSS_ISA naming the namespace. Everything but the two tables has
// internal linkage: no code for a newer processor can leak into the baseline through a weak symbol.
#include "contrastive.h"
#include "simd.h"

namespace {

using fastloss::cpu::kChunk;
using fastloss::cpu::kNoDiagonal;
using fastloss::cpu::Mask;
using fastloss::cpu::Scale;

// 32 rows by 256 float32 columns are 32 KiB: read for the maxima, they are still in L1 or L2 for the sums.
constexpr int64_t kBlock = 256;

template <class T>
constexpr T kInf = __builtin_huge_val();

template <class T>
FASTLOSS_INLINE T finite_or_zero(T x) {
  return (x == kInf<T> || x == -kInf<T>) ? T(0) : x;
}

FASTLOSS_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// Lanes of columns j.. of row i that take part (all bits set) or not; n lanes exist.
template <class T, bool kMasked>
FASTLOSS_INLINE Bits<T> kept(Mask mask, int64_t i, int64_t j, int n) {
  using L = Lanes<T>;
  Bits<T> keep = Bits<T>{} - 1;
  if (n < L::kCount)
    for (int l = n; l < L::kCount; ++l) keep[l] = 0;
  if constexpr (kMasked) {
    if (mask.row_ids)
      for (int l = 0; l < n; ++l) keep[l] &= -int64_t(mask.col_ids[j + l] != mask.row_ids[i]);
    const int64_t lane = mask.diagonal == kNoDiagonal ? -1 : i + mask.diagonal - j;
    if (lane >= 0 && lane < L::kCount) keep[lane] = 0;
  }
  return keep;
}

// Applies f(columns j.., number of lanes, their values, their mask) to one row; whole vectors skip the mask if there
// is none.
template <class T, bool kMasked, class F>
FASTLOSS_INLINE void for_each_vector(const T* c, Mask mask, int64_t i, int64_t begin, int64_t end, F&& f) {
  constexpr int kN = Lanes<T>::kCount;
  int64_t j = begin;
  for (; j + kN <= end; j += kN) f(j, kN, load(c + j), kept<T, kMasked>(mask, i, j, kN));
  if (j < end) f(j, int(end - j), load_some(c + j, int(end - j)), kept<T, kMasked>(mask, i, j, int(end - j)));
}

// A scale per row or column, or one for all.
template <class T>
FASTLOSS_INLINE T one_scale(Scale<T> scale, int64_t i) {
  return scale.values[scale.single ? 0 : i];
}
template <class T>
FASTLOSS_INLINE Vec<T> scales(Scale<T> scale, int64_t j, int n) {
  if (scale.single) return splat<T>(scale.values[0]);
  return n == Lanes<T>::kCount ? load(scale.values + j) : load_some(scale.values + j, n);
}

// Rows i0.. by columns begin..end of a tile: first the integer maxima of both directions, then the sums, which for one
// scale share their exponentials. Column results go to the chunk's own partials: disjoint between chunks.
template <class T, bool kMasked, bool kColumns, bool kShared>
FASTLOSS_INLINE void lse_block(const T* c, int64_t cols, Mask mask, int64_t i0, int64_t i1, int64_t begin, int64_t end,
                               Scale<T> row_scale, Scale<T> col_scale, T* row_max, T* row_sum, T* col_max, T* col_sum) {
  constexpr int kN = Lanes<T>::kCount;
  const Vec<T> none = splat<T>(-kInf<T>);
  Vec<T> top[kBlock / kN], col_shift[kBlock / kN], sum[kBlock / kN];
  T row_shift[kChunk];
  if (kColumns)
    for (int v = 0; v < kBlock / kN; ++v) top[v] = none, sum[v] = Vec<T>{};
  for (int64_t i = i0; i < i1; ++i) {
    const Vec<T> scale = splat<T>(one_scale(row_scale, i));
    Vec<T> row_top = none;
    for_each_vector<T, kMasked>(c + i * cols, mask, i, begin, end, [&](int64_t j, int n, Vec<T> x, Bits<T> keep) {
      const Vec<T> z = x * scale;
      row_top = vmax<T>(row_top, keep ? z : none);
      if (kColumns) {
        Vec<T>& t = top[(j - begin) / kN];
        t = vmax<T>(t, keep ? (kShared ? z : x * scales(col_scale, j, n)) : none);
      }
    });
    const T block_max = nearest<T>(splat<T>(max_of<T>(row_top)))[0];
    const T new_max = block_max > row_max[i] ? block_max : row_max[i];
    row_shift[i - i0] = finite_or_zero(new_max);  // all left out: -inf - 0, not -inf - -inf
    row_sum[i] *= pow2_one<T>(row_max[i] - row_shift[i - i0]);
    row_max[i] = new_max;
  }
  if (kColumns)
    for (int v = 0; v < kBlock / kN; ++v) {
      top[v] = nearest<T>(top[v]);
      col_shift[v] = magnitude_of<T>(top[v]) == kInf<T> ? Vec<T>{} : top[v];
    }
  for (int64_t i = i0; i < i1; ++i) {
    const Vec<T> scale = splat<T>(one_scale(row_scale, i)), shift = splat<T>(row_shift[i - i0]);
    Vec<T> row_total{};
    for_each_vector<T, kMasked>(c + i * cols, mask, i, begin, end, [&](int64_t j, int n, Vec<T> x, Bits<T> keep) {
      const Pow2<T> e = pow2_of_product<T>(x, scale);
      row_total += keep ? shifted_down<T>(e, shift) : Vec<T>{};
      if (kColumns) {
        const int64_t v = (j - begin) / kN;
        const Pow2<T> r = kShared ? e : pow2_of_product<T>(x, scales(col_scale, j, n));
        sum[v] += keep ? shifted_down<T>(r, col_shift[v]) : Vec<T>{};
      }
    });
    row_sum[i] += sum_of<T>(row_total);
  }
  if (kColumns)
    for (int64_t j = begin; j < end; j += kN) {
      const int n = int(lesser(kN, end - j));
      store_some<T>(col_max + j, top[(j - begin) / kN], n);
      store_some<T>(col_sum + j, sum[(j - begin) / kN], n);
    }
}

template <class T, bool kMasked, bool kColumns, bool kShared>
void lse_tile(const T* c, int64_t rows, int64_t cols, Scale<T> row_scale, Scale<T> col_scale, Mask mask, T* row_max,
              T* row_sum, T* col_max, T* col_sum, T* partials, int threads) {
  const int64_t chunks = (rows + kChunk - 1) / kChunk;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t i0 = chunk * kChunk, i1 = lesser(rows, i0 + kChunk);
      for (int64_t begin = 0; begin < cols; begin += kBlock)
        lse_block<T, kMasked, kColumns, kShared>(c, cols, mask, i0, i1, begin, lesser(cols, begin + kBlock), row_scale,
                                                 col_scale, row_max, row_sum, partials + 2 * chunk * cols,
                                                 partials + (2 * chunk + 1) * cols);
    }
    if (kColumns) {
#pragma omp for schedule(static)
      for (int64_t j = 0; j < cols; ++j) {
        T top = col_max[j];
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const T m = partials[2 * chunk * cols + j];
          top = m > top ? m : top;
        }
        const T shift = finite_or_zero(top);
        T sum = col_sum[j] * pow2_one<T>(col_max[j] - shift);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const T m = finite_or_zero(partials[2 * chunk * cols + j]);  // the shift that chunk used
          const T s = partials[(2 * chunk + 1) * cols + j];
          if (s != 0) sum += s * pow2_one<T>(m - shift);  // true for NaN as well
        }
        col_max[j] = top;
        col_sum[j] = sum;
      }
    }
  }
}

template <class T, bool kMasked, bool kColumns, bool kShared, bool kDots>
void grad_tile(const T* c, T* g, int64_t rows, int64_t cols, Scale<T> row_scale, const T* row_shift,
               const T* row_weight, Scale<T> col_scale, const T* col_shift, const T* col_weight, Mask mask, T* row_dot,
               T* col_dot, T* partials, int threads) {
  constexpr int kN = Lanes<T>::kCount;
  const int64_t chunks = (rows + kChunk - 1) / kChunk;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t i0 = chunk * kChunk, i1 = lesser(rows, i0 + kChunk);
      T* sums = partials + chunk * cols;  // used with kDots and kColumns only
      if (kDots && kColumns)
        for (int64_t j = 0; j < cols; ++j) sums[j] = 0;
      for (int64_t i = i0; i < i1; ++i) {
        const Vec<T> scale = splat<T>(one_scale(row_scale, i)), shift = splat<T>(row_shift[i]);
        const T weight = row_weight[i];
        Vec<T> dot{};
        for_each_vector<T, kMasked>(c + i * cols, mask, i, 0, cols, [&](int64_t j, int n, Vec<T> x, Bits<T> keep) {
          const bool whole = n == kN;
          auto at = [&](const T* p) { return whole ? load(p + j) : load_some(p + j, n); };
          const Pow2<T> e = pow2_of_product<T>(x, scale);
          const Vec<T> p = shifted_down<T>(e, shift);
          Vec<T> value = p * weight;
          if (kDots) dot += keep ? p * x : Vec<T>{};
          if (kColumns) {
            const Pow2<T> f = kShared ? e : pow2_of_product<T>(x, scales(col_scale, j, n));
            const Vec<T> r = shifted_down<T>(f, at(col_shift));
            value += r * at(col_weight);
            if (kDots) {
              const Vec<T> sum = at(sums) + (keep ? r * x : Vec<T>{});
              whole ? store(sums + j, sum) : store_some<T>(sums + j, sum, n);
            }
          }
          if (kMasked) value = keep ? value : Vec<T>{};
          T* out = g + i * cols + j;
          whole ? store(out, value) : store_some<T>(out, value, n);
        });
        if (kDots) row_dot[i] += sum_of<T>(dot);
      }
    }
    if (kDots && kColumns) {
#pragma omp for schedule(static)
      for (int64_t j = 0; j < cols; ++j) {
        T sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partials[chunk * cols + j];
        col_dot[j] += sum;
      }
    }
  }
}

// As much work as a few rows of the matrix; in double, for its own sake.
template <class T>
void turn(const T* max, const T* sum, Scale<T> scale, const T* diagonal, int64_t n, int directions, T* shift, T* weight,
          T* factor, T* slope, T* total) {
  constexpr double kLn2 = 0.693147180559945309417;
  double loss = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double natural = one_scale(scale, i), positive = natural * diagonal[i];
    double both = 0;
    for (int64_t at = i; at < directions * n; at += n) {
      const double lse = (__builtin_log2(double(sum[at])) + double(max[at])) * kLn2;
      const double x = lse - positive - 0 * (positive > 0 ? positive : 0);  // inf - inf, of a positive of +inf
      loss += x > 40 ? x : __builtin_log1p(__builtin_exp(x));
      const double upstream = 1 / (1 + __builtin_exp(-x)) / directions;
      both += upstream;
      const double over_sum = sum[at] == 0 ? 0 : upstream / double(sum[at]);
      shift[at] = finite_or_zero(max[at]);
      factor[at] = T(over_sum);
      weight[at] = T(over_sum * natural);
    }
    slope[i] = T(both);
  }
  *total = T(loss / directions);
}

FASTLOSS_INLINE bool touches(Mask mask, int64_t rows, int64_t cols) {
  return mask.row_ids || (mask.diagonal != kNoDiagonal && mask.diagonal < cols && mask.diagonal > -rows);
}

// Waking a second thread costs more than a tile of 16k entries.
FASTLOSS_INLINE int useful_threads(int64_t rows, int64_t cols, int threads) {
  return rows * cols <= (1 << 14) ? 1 : threads;
}

template <class T>
FASTLOSS_INLINE bool same(Scale<T> a, Scale<T> b) {
  return a.single && b.single && a.values[0] == b.values[0];
}

// f(j, lanes, values of x, values of y) along two rows.
template <class T, class F>
FASTLOSS_INLINE void along_rows(const T* x, const T* y, int64_t dim, F&& f) {
  constexpr int kN = Lanes<T>::kCount;
  int64_t j = 0;
  for (; j + kN <= dim; j += kN) f(j, kN, load(x + j), load(y + j));
  if (j < dim) f(j, int(dim - j), load_some(x + j, int(dim - j)), load_some(y + j, int(dim - j)));
}

template <class T>
FASTLOSS_INLINE T dot(const T* x, const T* y, int64_t dim) {
  Vec<T> sum{};
  along_rows(x, y, dim, [&](int64_t, int, Vec<T> a, Vec<T> b) { sum += a * b; });
  return sum_of<T>(sum);
}

template <class T>
void inverse_norms(const T* x, int64_t rows, int64_t dim, int64_t stride, T eps, T* out, int threads) {
  threads = useful_threads(rows, dim, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    const T norm = __builtin_sqrt(dot(x + i * stride, x + i * stride, dim));
    out[i] = norm == 0 ? T(0) : 1 / (norm < eps ? eps : norm);
  }
}

template <class T>
void through_norms(T* grad, const T* unit, const T* inverse, int64_t rows, int64_t dim, T eps, int threads) {
  threads = useful_threads(rows, dim, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    T* g = grad + i * dim;
    const T *u = unit + i * dim, scale = inverse[i];
    const T along = scale * eps < 1 ? dot(g, u, dim) : T(0);  // shorter rows are divided by eps, a constant
    along_rows(g, u, dim, [&](int64_t j, int n, Vec<T> a, Vec<T> b) {
      const Vec<T> out = (a - b * along) * scale;
      n == Lanes<T>::kCount ? store(g + j, out) : store_some<T>(g + j, out, n);
    });
  }
}

// A flag as a type: the loops are compiled for every combination.
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};
template <class F>
FASTLOSS_INLINE void with_flag(bool flag, F&& f) {
  flag ? f(Flag<true>()) : f(Flag<false>());
}

template <class T>
void lse_tile_any(const T* c, int64_t rows, int64_t cols, Scale<T> row_scale, Scale<T> col_scale, Mask mask, T* row_max,
                  T* row_sum, T* col_max, T* col_sum, T* partials, int threads) {
  threads = useful_threads(rows, cols, threads);
  const bool columns = col_scale.values != nullptr, shared = columns && same(row_scale, col_scale);
  with_flag(touches(mask, rows, cols), [&](auto masked) {
    auto run = [&](auto has_columns, auto is_shared) {
      lse_tile<T, decltype(masked)::value, decltype(has_columns)::value, decltype(is_shared)::value>(
          c, rows, cols, row_scale, col_scale, mask, row_max, row_sum, col_max, col_sum, partials, threads);
    };
    if (!columns)
      run(Flag<false>(), Flag<false>());
    else
      with_flag(shared, [&](auto is_shared) { run(Flag<true>(), is_shared); });
  });
}

template <class T>
void grad_tile_any(const T* c, T* g, int64_t rows, int64_t cols, Scale<T> row_scale, const T* row_shift,
                   const T* row_weight, Scale<T> col_scale, const T* col_shift, const T* col_weight, Mask mask,
                   T* row_dot, T* col_dot, T* partials, int threads) {
  threads = useful_threads(rows, cols, threads);
  const bool columns = col_scale.values != nullptr, shared = columns && same(row_scale, col_scale);
  with_flag(touches(mask, rows, cols), [&](auto masked) {
    with_flag(row_dot != nullptr, [&](auto dots) {
      auto run = [&](auto has_columns, auto is_shared) {
        grad_tile<T, decltype(masked)::value, decltype(has_columns)::value, decltype(is_shared)::value,
                  decltype(dots)::value>(c, g, rows, cols, row_scale, row_shift, row_weight, col_scale, col_shift,
                                         col_weight, mask, row_dot, col_dot, partials, threads);
      };
      if (!columns)
        run(Flag<false>(), Flag<false>());
      else
        with_flag(shared, [&](auto is_shared) { run(Flag<true>(), is_shared); });
    });
  });
}

}  // namespace

namespace fastloss {
namespace cpu {
namespace FASTLOSS_ISA {

extern const ContrastiveKernels<float> contrastive_float;
extern const ContrastiveKernels<double> contrastive_double;
const ContrastiveKernels<float> contrastive_float = {lse_tile_any<float>, grad_tile_any<float>, turn<float>,
                                                     inverse_norms<float>, through_norms<float>};
const ContrastiveKernels<double> contrastive_double = {lse_tile_any<double>, grad_tile_any<double>, turn<double>,
                                                       inverse_norms<double>, through_norms<double>};

}  // namespace FASTLOSS_ISA
}  // namespace cpu
}  // namespace fastloss
