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

// Writes past the caches, without reading the line first; p is aligned to 64 bytes.
template <class T>
FASTLOSS_INLINE void store_stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    __builtin_ia32_movntps512(p, v);
  else
    __builtin_ia32_movntpd512(p, v);
#elif defined(__AVX__)
  typedef T Half __attribute__((vector_size(32)));
  const Half* half = reinterpret_cast<const Half*>(&v);
  for (int i = 0; i < 2; ++i) {
    if constexpr (sizeof(T) == 4)
      __builtin_ia32_movntps256(p + 8 * i, half[i]);
    else
      __builtin_ia32_movntpd256(p + 4 * i, half[i]);
  }
#elif defined(__SSE2__)
  typedef T Quarter __attribute__((vector_size(16)));
  const Quarter* quarter = reinterpret_cast<const Quarter*>(&v);
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      __builtin_ia32_movntps(p + 4 * i, quarter[i]);
    else
      __builtin_ia32_movntpd(p + 2 * i, quarter[i]);
  }
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
    const int64_t head = int64_t((64 - (reinterpret_cast<uintptr_t>(g) & 63)) & 63) / int64_t(sizeof(T));
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

}  // namespace

namespace fastloss {
namespace cpu {
namespace FASTLOSS_ISA {

extern const SphericalKernels<float> spherical_float;
extern const SphericalKernels<double> spherical_double;
const SphericalKernels<float> spherical_float = {moments<float>, gradient_any<float>};
const SphericalKernels<double> spherical_double = {moments<double>, gradient_any<double>};

}  // namespace FASTLOSS_ISA
}  // namespace cpu
}  // namespace fastloss
