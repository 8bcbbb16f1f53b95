// Compiled once per instruction set, with FASTLOSS_ISA naming the namespace. Everything but the two tables has
// internal linkage: no code for a newer processor can leak into the baseline through a weak symbol.
#include "contrastive.h"
#include "simd.h"

namespace {

using fastloss::cpu::kChunk;
using fastloss::cpu::kNoDiagonal;
using fastloss::cpu::Mask;

// 32 rows by 256 float32 columns are 32 KiB: read for the rows, they are still in L1 or L2 for the columns.
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
    if (mask.row_ids) {
      typename L::Ids ids{};
      if (n == L::kCount)
        ids = *reinterpret_cast<const typename L::UnalignedIds*>(mask.col_ids + j);
      else
        for (int l = 0; l < n; ++l) ids[l] = mask.col_ids[j + l];
      keep &= __builtin_convertvector(ids != mask.row_ids[i], Bits<T>);
    }
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

template <class T, bool kMasked>
FASTLOSS_INLINE void lse_row(const T* c, Mask mask, int64_t i, int64_t begin, int64_t end, T scale, T* row_max,
                             T* row_sum) {
  const Vec<T> none = splat<T>(-kInf<T>);
  Vec<T> top =
      none;  // of rounded products: it only shifts; the exponents below are one fused operation, as in grad_tile
  for_each_vector<T, kMasked>(c, mask, i, begin, end, [&](int64_t, int, Vec<T> v, Bits<T> keep) {
    top = vmax<T>(top, keep ? v * scale : none);
  });
  const T block_max = max_of<T>(top);
  const T new_max = block_max > row_max[i] ? block_max : row_max[i];
  const T shift = finite_or_zero(new_max);  // all left out: -inf - 0, not -inf - -inf
  Vec<T> sum{};
  for_each_vector<T, kMasked>(c, mask, i, begin, end, [&](int64_t, int, Vec<T> v, Bits<T> keep) {
    sum += keep ? exp2<T>(v * scale - shift) : Vec<T>{};
  });
  row_sum[i] = row_sum[i] * exp2_one<T>(row_max[i] - shift) + sum_of<T>(sum);
  row_max[i] = new_max;
}

// Statistics of the columns j.. of one chunk, written to its own partials: disjoint between chunks.
template <class T, bool kMasked>
FASTLOSS_INLINE void lse_columns(const T* c, int64_t cols, Mask mask, int64_t i0, int64_t i1, int64_t j, int n,
                                 const T* col_scale, T* out_max, T* out_sum) {
  constexpr int kN = Lanes<T>::kCount;
  const bool whole = n == kN;
  const Vec<T> none = splat<T>(-kInf<T>);
  const Vec<T> scale = whole ? load(col_scale + j) : load_some(col_scale + j, n);
  auto value = [&](int64_t i) { return whole ? load(c + i * cols + j) : load_some(c + i * cols + j, n); };
  auto keep = [&](int64_t i) { return kept<T, kMasked>(mask, i, j, n); };
  Vec<T> top = none;
  for (int64_t i = i0; i < i1; ++i) top = vmax<T>(top, keep(i) ? value(i) * scale : none);
  const Vec<T> magnitude = top < 0 ? -top : top;
  const Vec<T> shift = magnitude == kInf<T> ? Vec<T>{} : top;
  Vec<T> sum{};
  for (int64_t i = i0; i < i1; ++i) sum += keep(i) ? exp2<T>(value(i) * scale - shift) : Vec<T>{};
  if (whole) {
    store(out_max + j, top);
    store(out_sum + j, sum);
  } else {
    store_some<T>(out_max + j, top, n);
    store_some<T>(out_sum + j, sum, n);
  }
}

template <class T, bool kMasked>
void lse_tile(const T* c, int64_t rows, int64_t cols, const T* row_scale, const T* col_scale, Mask mask, T* row_max,
              T* row_sum, T* col_max, T* col_sum, T* partials, int threads) {
  constexpr int kN = Lanes<T>::kCount;
  const int64_t chunks = (rows + kChunk - 1) / kChunk;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t i0 = chunk * kChunk, i1 = lesser(rows, i0 + kChunk);
      for (int64_t block = 0; block < cols; block += kBlock) {
        const int64_t end = lesser(cols, block + kBlock);
        for (int64_t i = i0; i < i1; ++i)
          lse_row<T, kMasked>(c + i * cols, mask, i, block, end, row_scale[i], row_max, row_sum);
        if (col_scale)
          for (int64_t j = block; j < end; j += kN)
            lse_columns<T, kMasked>(c, cols, mask, i0, i1, j, int(lesser(kN, end - j)), col_scale,
                                    partials + 2 * chunk * cols, partials + (2 * chunk + 1) * cols);
      }
    }
    if (col_scale) {
#pragma omp for schedule(static)
      for (int64_t j = 0; j < cols; ++j) {
        T top = col_max[j];
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const T m = partials[2 * chunk * cols + j];
          top = m > top ? m : top;
        }
        const T shift = finite_or_zero(top);
        T sum = col_sum[j] * exp2_one<T>(col_max[j] - shift);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const T m = finite_or_zero(partials[2 * chunk * cols + j]);  // the shift that chunk used
          const T s = partials[(2 * chunk + 1) * cols + j];
          if (s != 0) sum += s * exp2_one<T>(m - shift);  // true for NaN as well
        }
        col_max[j] = top;
        col_sum[j] = sum;
      }
    }
  }
}

template <class T, bool kMasked, bool kColumns, bool kDots>
void grad_tile(const T* c, T* g, int64_t rows, int64_t cols, const T* row_scale, const T* row_shift,
               const T* row_weight, const T* col_scale, const T* col_shift, const T* col_weight, Mask mask, T* row_dot,
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
        const T scale = row_scale[i], shift = row_shift[i], weight = row_weight[i];
        Vec<T> dot{};
        for_each_vector<T, kMasked>(c + i * cols, mask, i, 0, cols, [&](int64_t j, int n, Vec<T> v, Bits<T> keep) {
          const bool whole = n == kN;
          auto at = [&](const T* p) { return whole ? load(p + j) : load_some(p + j, n); };
          const Vec<T> p = exp2<T>(v * scale - shift);
          Vec<T> value = p * weight;
          if (kDots) dot += keep ? p * v : Vec<T>{};
          if (kColumns) {
            const Vec<T> r = exp2<T>(v * at(col_scale) - at(col_shift));
            value += r * at(col_weight);
            if (kDots) {
              const Vec<T> sum = at(sums) + (keep ? r * v : Vec<T>{});
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

FASTLOSS_INLINE bool touches(Mask mask, int64_t rows, int64_t cols) {
  return mask.row_ids || (mask.diagonal != kNoDiagonal && mask.diagonal < cols && mask.diagonal > -rows);
}

template <class T>
void lse_tile_any(const T* c, int64_t rows, int64_t cols, const T* row_scale, const T* col_scale, Mask mask, T* row_max,
                  T* row_sum, T* col_max, T* col_sum, T* partials, int threads) {
  (touches(mask, rows, cols) ? lse_tile<T, true> : lse_tile<T, false>)(c, rows, cols, row_scale, col_scale, mask,
                                                                       row_max, row_sum, col_max, col_sum, partials,
                                                                       threads);
}

template <class T, bool kMasked>
FASTLOSS_INLINE auto grad_tile_for(bool columns, bool dots) {
  if (columns) return dots ? grad_tile<T, kMasked, true, true> : grad_tile<T, kMasked, true, false>;
  return dots ? grad_tile<T, kMasked, false, true> : grad_tile<T, kMasked, false, false>;
}

template <class T>
void grad_tile_any(const T* c, T* g, int64_t rows, int64_t cols, const T* row_scale, const T* row_shift,
                   const T* row_weight, const T* col_scale, const T* col_shift, const T* col_weight, Mask mask,
                   T* row_dot, T* col_dot, T* partials, int threads) {
  const bool columns = col_scale != nullptr, dots = row_dot != nullptr;
  (touches(mask, rows, cols) ? grad_tile_for<T, true>(columns, dots) : grad_tile_for<T, false>(columns, dots))(
      c, g, rows, cols, row_scale, row_shift, row_weight, col_scale, col_shift, col_weight, mask, row_dot, col_dot,
      partials, threads);
}

}  // namespace

namespace fastloss {
namespace cpu {
namespace FASTLOSS_ISA {

extern const ContrastiveKernels<float> contrastive_float;
extern const ContrastiveKernels<double> contrastive_double;
const ContrastiveKernels<float> contrastive_float = {lse_tile_any<float>, grad_tile_any<float>};
const ContrastiveKernels<double> contrastive_double = {lse_tile_any<double>, grad_tile_any<double>};

}  // namespace FASTLOSS_ISA
}  // namespace cpu
}  // namespace fastloss
