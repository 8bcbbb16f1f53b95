// Compiled once per instruction set, with FASTLOSS_ISA naming the namespace; see contrastive_kernels.cpp.
#include "simd.h"
#include "spherical.h"

namespace {

using fastloss::cpu::kSphericalChunk;

// A block is read twice, for its mean and about its mean; 8 KiB of float32 stay in L1 in between.
constexpr int64_t kBlock = 2048;
// Gradients beyond this size leave the caches before anybody reads them: they are written past the caches.
constexpr int64_t kStreamBytes = 16 << 20;

FASTLOSS_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// Writes past the caches, without reading the line first; p is aligned to a register.
template <class T>
FASTLOSS_INLINE void store_stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    __builtin_ia32_movntps512(p, v);
  else
    __builtin_ia32_movntpd512(p, v);
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4)
    __builtin_ia32_movntps256(p, v);
  else
    __builtin_ia32_movntpd256(p, v);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4)
    __builtin_ia32_movntps(p, v);
  else
    __builtin_ia32_movntpd(p, v);
#else
  store(p, v);
#endif
}

FASTLOSS_INLINE void finish_stream() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

template <class T>
FASTLOSS_INLINE Vec<T> lanes_below(int n, Vec<T> v) {
  Bits<T> keep{};
  for (int l = 0; l < n; ++l) keep[l] = -1;
  return keep ? v : Vec<T>{};
}

// Count, mean and sum of squares about the mean of what was seen.
struct Moments {
  double count, mean, square;
};

FASTLOSS_INLINE void merge(Moments& all, double count, double mean, double square) {
  const double total = all.count + count, delta = mean - all.mean;
  all.square += square + delta * delta * (all.count * count / total);
  all.mean += delta * (count / total);
  all.count = total;
}

// One block about its own mean. The mean of the first sweep only has to be near: the second sums what is left over.
template <class T>
FASTLOSS_INLINE void add_block(const T* x, int64_t n, Moments& all) {
  constexpr int kN = Lanes<T>::kCount;
  const int rest = int(n % kN);
  const int64_t whole = n - rest;
  const Vec<T> tail = rest ? load_some(x + whole, rest) : Vec<T>{};
  Vec<T> s0{}, s1{}, s2{}, s3{};
  int64_t j = 0;
  for (; j + 4 * kN <= whole; j += 4 * kN) {
    s0 += load(x + j);
    s1 += load(x + j + kN);
    s2 += load(x + j + 2 * kN);
    s3 += load(x + j + 3 * kN);
  }
  for (; j < whole; j += kN) s0 += load(x + j);
  if (rest) s1 += tail;
  const T near = T(double(sum_of<T>((s0 + s1) + (s2 + s3))) / double(n));
  Vec<T> e0{}, e1{}, q0{}, q1{};
  auto add = [&](Vec<T> d, Vec<T>& e, Vec<T>& q) {
    e += d;
    q += d * d;
  };
  for (j = 0; j + 2 * kN <= whole; j += 2 * kN) {
    add(load(x + j) - near, e0, q0);
    add(load(x + j + kN) - near, e1, q1);
  }
  for (; j < whole; j += kN) add(load(x + j) - near, e0, q0);
  if (rest) add(lanes_below<T>(rest, tail - near), e1, q1);
  const double left = double(sum_of<T>(e0 + e1)) / double(n);
  merge(all, double(n), double(near) + left, double(sum_of<T>(q0 + q1)) - left * left * double(n));
}

template <class T>
void moments(const T* x, int64_t stride, int64_t rows, int64_t cols, const int64_t* target, T* high, T* low, T* square,
             T* centred, T* logit, double* partials, int threads) {
  const int64_t chunks = (cols + kSphericalChunk - 1) / kSphericalChunk;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t work = 0; work < rows * chunks; ++work) {
      const int64_t i = work / chunks, begin = work % chunks * kSphericalChunk;
      const int64_t end = lesser(cols, begin + kSphericalChunk);
      Moments part{0, 0, 0};
      for (int64_t j = begin; j < end; j += kBlock) add_block(x + i * stride + j, lesser(kBlock, end - j), part);
      partials[2 * work] = part.mean;
      partials[2 * work + 1] = part.square;
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      Moments all{0, 0, 0};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const double* part = partials + 2 * (i * chunks + chunk);
        merge(all, double(lesser(kSphericalChunk, cols - chunk * kSphericalChunk)), part[0], part[1]);
      }
      high[i] = T(all.mean);
      low[i] = T(all.mean - double(high[i]));
      square[i] = T(all.square < 0 ? 0 : all.square);
      logit[i] = target[i] < 0 ? T(0) : x[i * stride + target[i]];
      centred[i] = target[i] < 0 ? T(0) : (logit[i] - high[i]) - low[i];
    }
  }
}

template <class T, bool kStream>
FASTLOSS_INLINE void gradient_row(const T* x, T* g, int64_t cols, T high, T low, T shift, T scale) {
  constexpr int kN = Lanes<T>::kCount;
  auto value = [&](Vec<T> v) { return ((v - high) - low) * scale + shift; };
  int64_t j = 0;
  if (kStream) {
    const int64_t head = int64_t(-reinterpret_cast<uintptr_t>(g) % kRegister) / int64_t(sizeof(T));
    if (head) {
      j = lesser(head, cols);
      store_some<T>(g, value(load_some(x, int(j))), int(j));
    }
  }
  for (; j + kN <= cols; j += kN) {
    const Vec<T> v = value(load(x + j));
    kStream ? store_stream(g + j, v) : store(g + j, v);
  }
  if (j < cols) store_some<T>(g + j, value(load_some(x + j, int(cols - j))), int(cols - j));
}

template <class T, bool kStream>
void gradient(const T* x, int64_t x_stride, T* g, int64_t g_stride, int64_t rows, int64_t cols, const int64_t* target,
              const T* high, const T* low, const T* shift, const T* scale, const T* spike, int threads) {
  const int64_t chunks = (cols + kSphericalChunk - 1) / kSphericalChunk;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t work = 0; work < rows * chunks; ++work) {
      const int64_t i = work / chunks, begin = work % chunks * kSphericalChunk;
      const int64_t end = lesser(cols, begin + kSphericalChunk);
      T* out = g + i * g_stride;
      if (shift[i] == 0 && scale[i] == 0 && spike[i] == 0) {
        for (int64_t j = begin; j < end; ++j) out[j] = 0;
        continue;
      }
      const bool here = target[i] >= begin && target[i] < end;
      // Before its row: g may be x.
      const T peak =
          here ? ((x[i * x_stride + target[i]] - high[i]) - low[i]) * scale[i] + (shift[i] + spike[i]) : T(0);
      gradient_row<T, kStream>(x + i * x_stride + begin, out + begin, end - begin, high[i], low[i], shift[i], scale[i]);
      if (here) {
        if (kStream) finish_stream();
        out[target[i]] = peak;
      }
    }
    if (kStream) finish_stream();
  }
}

template <class T>
void gradient_any(const T* x, int64_t x_stride, T* g, int64_t g_stride, int64_t rows, int64_t cols,
                  const int64_t* target, const T* high, const T* low, const T* shift, const T* scale, const T* spike,
                  int threads) {
  const bool stream = g != x && rows * cols * int64_t(sizeof(T)) > kStreamBytes;
  (stream ? gradient<T, true> : gradient<T, false>)(x, x_stride, g, g_stride, rows, cols, target, high, low, shift,
                                                    scale, spike, threads);
}

// out_j = f(j) for j < d, a vector at a time; f(j, n) gives the n lanes from j on, n = 0 for all of them.
template <class T, class F>
FASTLOSS_INLINE void fill(T* out, int64_t d, F f) {
  constexpr int kN = Lanes<T>::kCount;
  int64_t j = 0;
  for (; j + kN <= d; j += kN) store(out + j, f(j, 0));
  if (j < d) store_some<T>(out + j, f(j, int(d - j)), int(d - j));
}

template <class T>
FASTLOSS_INLINE Vec<T> part(const T* p, int n) {
  return n ? load_some(p, n) : load(p);
}

template <class T>
FASTLOSS_INLINE T dot(const T* a, const T* b, int64_t d) {
  constexpr int kN = Lanes<T>::kCount;
  Vec<T> s0{}, s1{};
  int64_t j = 0;
  for (; j + 2 * kN <= d; j += 2 * kN) {
    s0 += load(a + j) * load(b + j);
    s1 += load(a + j + kN) * load(b + j + kN);
  }
  for (; j + kN <= d; j += kN) s0 += load(a + j) * load(b + j);
  if (j < d) s1 += load_some(a + j, int(d - j)) * load_some(b + j, int(d - j));
  return sum_of<T>(s0 + s1);
}

template <class T>
void factored_statistics(const T* rows, const T* product, const T* hidden, const T* mean_row, int64_t n, int64_t pairs,
                         int64_t d, T* t, T* square, T* mean, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < n; ++i) {
    const T* h = hidden + i * d;
    for (int64_t k = 0; k < pairs; ++k) t[i * pairs + k] = dot(rows + (i * pairs + k) * d, h, d);
    const T q = dot(product + i * d, h, d);
    square[i] = q < 0 ? T(0) : q;
    mean[i] = dot(mean_row, h, d);
  }
}

template <class T>
void factored_gradient(const T* rows, const T* product, const T* mean_row, const T* g_t, const T* g_v, const T* g_mean,
                       int64_t n, int64_t pairs, int64_t d, T* weighted, T* gradient, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < n; ++i) {
    T* w = weighted + i * d;
    if (pairs == 0) fill(w, d, [](int64_t, int) { return Vec<T>{}; });
    for (int64_t k = 0; k < pairs; ++k) {
      const T g = g_t[i * pairs + k];
      const T* row = rows + (i * pairs + k) * d;
      if (k == 0)
        fill(w, d, [&](int64_t j, int m) { return part(row + j, m) * g; });
      else
        fill(w, d, [&](int64_t j, int m) { return part(w + j, m) + part(row + j, m) * g; });
    }
    const T twice = 2 * g_v[i], shift = g_mean[i];
    const T* p = product + i * d;
    fill(gradient + i * d, d,
         [&](int64_t j, int m) { return part(w + j, m) + part(p + j, m) * twice + part(mean_row + j, m) * shift; });
  }
}

template <class T>
void factored_factors(const T* hidden, const T* product, const T* weighted, const T* g_v, T lr, T shrink, int64_t n,
                      int64_t d, T* scaled, T* half, T* full, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < n; ++i) {
    const T diagonal = -2 * lr * g_v[i];
    const T *h = hidden + i * d, *p = product + i * d, *w = weighted + i * d;
    fill(scaled + i * d, d, [&](int64_t j, int m) { return part(h + j, m) * diagonal; });
    fill(half + i * d, d, [&](int64_t j, int m) { return part(p + j, m) * (diagonal / 2) - part(w + j, m) * lr; });
    fill(full + i * d, d, [&](int64_t j, int m) { return (part(p + j, m) * diagonal - part(w + j, m) * lr) * shrink; });
  }
}

template <class T>
void factored_pairs(T* x, const int64_t* target, const T* g_t, const T* g_v, T lr, T classes, int64_t n) {
  const T same = lr * lr / 2, all = same / classes;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const T factor = (target[i] == target[j] ? same : T(0)) - all;
      x[i * n + j] = x[i * n + j] * (-2 * lr * g_v[j]) + factor * (g_t[i] * g_t[j]);
    }
}

template <class T>
bool factored_inverse(T* x, const T* g_v, T lr, T shrink, int64_t n, int64_t* order) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) x[i * n + j] *= -2 * lr * g_v[j];
    x[i * n + i] += shrink;
  }
  for (int64_t p = 0; p < n; ++p) {
    int64_t best = p;
    T size = 0;
    for (int64_t i = p; i < n; ++i) {
      const T here = x[i * n + p] < 0 ? -x[i * n + p] : x[i * n + p];
      if (here > size) {
        size = here;
        best = i;
      }
    }
    order[p] = best;
    if (!(size > 0)) return false;
    T* row = x + p * n;
    if (best != p)
      for (int64_t j = 0; j < n; ++j) {
        const T kept = row[j];
        row[j] = x[best * n + j];
        x[best * n + j] = kept;
      }
    const T inverse = 1 / row[p];
    row[p] = 1;
    fill(row, n, [&](int64_t j, int m) { return part(row + j, m) * inverse; });
    for (int64_t i = 0; i < n; ++i) {
      if (i == p) continue;
      T* other = x + i * n;
      const T factor = other[p];
      other[p] = 0;
      fill(other, n, [&](int64_t j, int m) { return part(other + j, m) - part(row + j, m) * factor; });
    }
  }
  for (int64_t p = n - 1; p >= 0; --p)  // rows were swapped, so columns of the inverse are
    if (order[p] != p)
      for (int64_t i = 0; i < n; ++i) {
        const T kept = x[i * n + p];
        x[i * n + p] = x[i * n + order[p]];
        x[i * n + order[p]] = kept;
      }
  return true;
}

template <class T>
T factored_growth(const T* solution, const T* hidden, int64_t n, int64_t d) {
  T most = 0;  // of the squares
  for (int64_t i = 0; i < n; ++i) {
    const T size = dot(hidden + i * d, hidden + i * d, d);
    if (size == 0) continue;
    const T ratio = dot(solution + i * d, solution + i * d, d) / size;
    if (!(ratio == ratio)) return T(__builtin_inf());
    most = ratio > most ? ratio : most;
  }
  return T(__builtin_sqrt(double(most)));
}

template <class T>
void factored_scatter(T* v, const int64_t* target, const T* g_t, const T* solution, T lr, int64_t n, int64_t pairs,
                      int64_t d, int threads) {
  constexpr int64_t kColumns = 128;  // of a row, for one thread: classes repeat, so rows are not split among threads
  const int64_t blocks = (d + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kColumns, width = lesser(kColumns, d - begin);
    for (int64_t i = 0; i < n * pairs; ++i) {
      const T factor = -lr * g_t[i];
      T* out = v + target[i] * d + begin;
      const T* z = solution + i / pairs * d + begin;
      fill(out, width, [&](int64_t j, int m) { return part(out + j, m) + part(z + j, m) * factor; });
    }
  }
}

// Square blocks, so that the column of `change` that meets a row comes from L1.
constexpr int64_t kSquare = 16;

template <class T>
void symmetric_update(T* x, const T* change, int64_t n, T scale, int threads) {
  constexpr int kN = Lanes<T>::kCount;
  const int64_t blocks = (n + kSquare - 1) / kSquare;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < blocks; ++row) {
    T turned[kSquare * kSquare];
    const int64_t i0 = row * kSquare, height = lesser(kSquare, n - i0);
    for (int64_t j0 = 0; j0 < n; j0 += kSquare) {
      const int64_t width = lesser(kSquare, n - j0);
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = 0; i < height; ++i) turned[i * kSquare + j] = change[(j0 + j) * n + i0 + i];
      for (int64_t i = 0; i < height; ++i) {
        T* out = x + (i0 + i) * n + j0;
        const T *a = change + (i0 + i) * n + j0, *b = turned + i * kSquare;
        int64_t j = 0;
        for (; j + kN <= width; j += kN) store(out + j, load(out + j) * scale + (load(a + j) + load(b + j)));
        for (; j < width; ++j) out[j] = out[j] * scale + (a[j] + b[j]);
      }
    }
  }
}

}  // namespace

namespace fastloss {
namespace cpu {
namespace FASTLOSS_ISA {

extern const SphericalKernels<float> spherical_float;
extern const SphericalKernels<double> spherical_double;
const SphericalKernels<float> spherical_float = {
    moments<float>,          gradient_any<float>,    factored_statistics<float>, factored_gradient<float>,
    factored_factors<float>, factored_pairs<float>,  factored_inverse<float>,    factored_growth<float>,
    factored_scatter<float>, symmetric_update<float>};
const SphericalKernels<double> spherical_double = {
    moments<double>,          gradient_any<double>,    factored_statistics<double>, factored_gradient<double>,
    factored_factors<double>, factored_pairs<double>,  factored_inverse<double>,    factored_growth<double>,
    factored_scatter<double>, symmetric_update<double>};

}  // namespace FASTLOSS_ISA
}  // namespace cpu
}  // namespace fastloss
