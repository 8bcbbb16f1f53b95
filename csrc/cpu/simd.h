// Fixed-width vectors for the CPU kernels, on the compiler's vector extension (GCC and Clang).
//
// A vector is 64 bytes on every instruction set: one AVX-512 register, two AVX2, four SSE or NEON.
// One body therefore serves all of them, and lane order, hence rounding, does not depend on the width
// of the hardware's registers.
//
// Only <stdint.h> may be included here: this header is compiled once per instruction set, and an inline
// function of the standard library compiled for AVX-512 could be the copy the linker keeps for everyone.
#pragma once

#include <stdint.h>

namespace {

#define FASTLOSS_INLINE inline __attribute__((always_inline))

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int kCount = 16;
  typedef float Vec __attribute__((vector_size(64)));
  typedef float Unaligned __attribute__((vector_size(64), aligned(4), may_alias));
  typedef int32_t Bits __attribute__((vector_size(64)));
  typedef int64_t Ids __attribute__((vector_size(128)));
  typedef int64_t UnalignedIds __attribute__((vector_size(128), aligned(8), may_alias));
  // 2^f on [-1/2, 1/2] by Chebyshev interpolation of degree 6: relative error 2.6e-9.
  static constexpr int kDegree = 6;
  static constexpr double kExp2[] = {1.0,
                                     0.69314720670283259577,
                                     0.24022650922288758071,
                                     0.055503272266703020589,
                                     0.0096180566785246380754,
                                     0.001340042817761583794,
                                     0.00015461444698569129083};
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  static constexpr float kWhole = 8388608.0f;   // 2^23: from here on every number is whole
  static constexpr int kMantissa = 23;
  static constexpr int32_t kOne = 0x3f800000;
  static constexpr float kLowest = -127.0f, kHighest = 128.0f;  // exponents whose bit patterns are 0 and infinity
};

template <>
struct Lanes<double> {
  static constexpr int kCount = 8;
  typedef double Vec __attribute__((vector_size(64)));
  typedef double Unaligned __attribute__((vector_size(64), aligned(8), may_alias));
  typedef int64_t Bits __attribute__((vector_size(64)));
  typedef int64_t Ids __attribute__((vector_size(64)));
  typedef int64_t UnalignedIds __attribute__((vector_size(64), aligned(8), may_alias));
  // Degree 12: relative error 5.7e-20.
  static constexpr int kDegree = 12;
  static constexpr double kExp2[] = {1.0,
                                     0.69314718055994530835,
                                     0.24022650695910071228,
                                     0.055504108664821698992,
                                     0.0096181291076284830543,
                                     0.0013333558146390352775,
                                     0.00015403530393362755291,
                                     0.000015252733856293466416,
                                     1.3215486815999976975e-6,
                                     1.017805119296064896e-7,
                                     7.0548943863483480445e-9,
                                     4.4566753410492058782e-10,
                                     2.5733568308756891235e-11};
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kWhole = 4503599627370496.0;  // 2^52
  static constexpr int kMantissa = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000;
  static constexpr double kLowest = -1023.0, kHighest = 1024.0;
};

template <class T>
using Vec = typename Lanes<T>::Vec;
template <class T>
using Bits = typename Lanes<T>::Bits;

template <class T>
FASTLOSS_INLINE Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

template <class T>
FASTLOSS_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}

template <class T>
FASTLOSS_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = v;
}

// The first n < kCount lanes; the rest are zero.
template <class T>
FASTLOSS_INLINE Vec<T> load_some(const T* p, int n) {
  Vec<T> v{};
  for (int l = 0; l < n; ++l) v[l] = p[l];
  return v;
}

template <class T>
FASTLOSS_INLINE void store_some(T* p, Vec<T> v, int n) {
  for (int l = 0; l < n; ++l) p[l] = v[l];
}

// The comparison is false for NaN in b, so NaN never becomes the maximum: it reaches the sums through exp2 instead.
template <class T>
FASTLOSS_INLINE Vec<T> vmax(Vec<T> a, Vec<T> b) {
  return b > a ? b : a;
}

template <class T>
FASTLOSS_INLINE T max_of(Vec<T> v) {
  T m = v[0];
  for (int l = 1; l < Lanes<T>::kCount; ++l) m = v[l] > m ? v[l] : m;
  return m;
}

template <class T>
FASTLOSS_INLINE T sum_of(Vec<T> v) {
  T s[Lanes<T>::kCount];
  store(s, v);
  for (int w = Lanes<T>::kCount / 2; w > 0; w /= 2)
    for (int l = 0; l < w; ++l) s[l] += s[l + w];
  return s[0];
}

// 2^z in two parts, mantissa * 2^exponent with an integer exponent (infinite or NaN for such z).
template <class T>
struct Pow2 {
  Vec<T> mantissa, exponent;
};

template <class T>
FASTLOSS_INLINE Vec<T> magnitude_of(Vec<T> x) {
  return x < 0 ? -x : x;
}

#ifdef __AVX512F__
// One instruction each; results are those of the general forms below (but for subnormal powers, which those flush).
constexpr int kCurrentRounding = 4;
FASTLOSS_INLINE Vec<float> nearest_here(Vec<float> z) {
  return __builtin_ia32_rndscaleps_mask(z, 8, z, uint16_t(-1), kCurrentRounding);
}
FASTLOSS_INLINE Vec<double> nearest_here(Vec<double> z) {
  return __builtin_ia32_rndscalepd_mask(z, 8, z, uint8_t(-1), kCurrentRounding);
}
FASTLOSS_INLINE Vec<float> scale_here(Vec<float> x, Vec<float> e) {
  return __builtin_ia32_scalefps512_mask(x, e, x, uint16_t(-1), kCurrentRounding);
}
FASTLOSS_INLINE Vec<double> scale_here(Vec<double> x, Vec<double> e) {
  return __builtin_ia32_scalefpd512_mask(x, e, x, uint8_t(-1), kCurrentRounding);
}
#endif

// The integer nearest to z: adding kWhole leaves no fraction. Larger values have none.
template <class T>
FASTLOSS_INLINE Vec<T> nearest(Vec<T> z) {
#ifdef __AVX512F__
  return nearest_here(z);
#else
  const Vec<T> whole = splat<T>(Lanes<T>::kWhole);
  const Vec<T> away = z < 0 ? -whole : whole;
  return magnitude_of<T>(z) < whole ? (z + away) - away : z;
#endif
}

// 2^(x * scale). The product enters the mantissa unrounded where the processor has a fused multiply-add; exponents are
// exact, so that 2^(x * scale - shift) for an integer shift is the same number whatever the shift was.
template <class T>
FASTLOSS_INLINE Pow2<T> pow2_of_product(Vec<T> x, Vec<T> scale) {
  using L = Lanes<T>;
  const Vec<T> z = x * scale;
  const Vec<T> n = nearest<T>(z);
  Vec<T> f = x * scale - n;
  f = magnitude_of<T>(z) >= L::kWhole ? Vec<T>{} : f;
  Vec<T> p = splat<T>(T(L::kExp2[L::kDegree]));
#pragma GCC unroll 16
  for (int d = L::kDegree - 1; d >= 0; --d) p = p * f + T(L::kExp2[d]);
  return {p, n};
}

// x.mantissa * 2^(x.exponent - shift). Exact zero below the smallest normal number, infinity above the largest.
template <class T>
FASTLOSS_INLINE Vec<T> shifted_down(Pow2<T> x, Vec<T> shift) {
#ifdef __AVX512F__
  return scale_here(x.mantissa, x.exponent - shift);
#else
  using L = Lanes<T>;
  const Vec<T> low = splat<T>(L::kLowest), high = splat<T>(L::kHighest);
  Vec<T> e = x.exponent - shift;
  e = low > e ? low : e;
  e = high < e ? high : e;
  const Vec<T> biased = e + L::kRound;
  return x.mantissa * reinterpret_cast<Vec<T> >((reinterpret_cast<Bits<T> >(biased) << L::kMantissa) + L::kOne);
#endif
}

// 2^x.
template <class T>
FASTLOSS_INLINE Vec<T> exp2(Vec<T> x) {
  return shifted_down<T>(pow2_of_product<T>(x, splat<T>(1)), Vec<T>{});
}

// 2^x for an integer x.
template <class T>
FASTLOSS_INLINE T pow2_one(T x) {
  return shifted_down<T>({splat<T>(1), splat<T>(x)}, Vec<T>{})[0];
}

}  // namespace
