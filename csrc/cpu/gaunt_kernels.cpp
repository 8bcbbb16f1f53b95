// Compiled once per instruction set; see contrastive_kernels.cpp for the rules.
#include "gaunt.h"
#include "simd.h"

namespace {

using fastloss::cpu::GauntEntry;
using fastloss::cpu::GauntProgram;
using fastloss::cpu::kRingPairs;

// Orders of a product computed together: each takes two accumulators, of 16 registers at least.
constexpr int kTile = 4;
constexpr int64_t kPad = kTile - 1;  // zeros on both sides of a spectrum, so that tiles need no bounds
// Lane blocks that go through the sparse tensor together: its entries, and the branches between them, are read once.
constexpr int kAbreast = 4;

FASTLOSS_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLOSS_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
FASTLOSS_INLINE int64_t square(int64_t a) { return a * a; }

// Vectors of a spectrum -band..band with its zeros: cosine and sine parts side by side.
FASTLOSS_INLINE int64_t spectrum_size(int64_t band) { return 2 * (2 * band + 1 + 2 * kPad); }

// First entry of order m in a table of the given degree.
FASTLOSS_INLINE int64_t order_at(int64_t degree, int64_t m) { return m * (degree + 1) - m * (m - 1) / 2; }

// One lane block of a tensor: kCount functions, the first `count` of which exist.
template <class T>
FASTLOSS_INLINE int64_t offset_of(const GauntProgram<T>& p, int64_t lane, int64_t d) {
  return p.channels == 0 ? lane * d : lane / p.channels * p.channels * d + lane % p.channels;
}

template <class T>
FASTLOSS_INLINE bool side_by_side(const GauntProgram<T>& p, int64_t lane, int count) {
  return p.channels && count == Lanes<T>::kCount && lane % p.channels + count <= p.channels;
}

// Entry c is number of(c) of the two vectors.
template <class T, class F>
FASTLOSS_INLINE Vec<T> pick(Vec<T> a, Vec<T> b, const F& of) {
  constexpr int kN = Lanes<T>::kCount;
#ifdef __clang__
  Vec<T> out;
  for (int c = 0; c < kN; ++c) out[c] = of(c) < kN ? a[of(c)] : b[of(c) - kN];
  return out;
#else
  Bits<T> places{};
  for (int c = 0; c < kN; ++c) places[c] = of(c);
  return __builtin_shuffle(a, b, places);
#endif
}

// One step of a transposition: swaps the blocks of S columns off the diagonal.
template <class T, int S>
FASTLOSS_INLINE void exchange(Vec<T>& a, Vec<T>& b) {
  constexpr int kN = Lanes<T>::kCount;
  const Vec<T> low = pick<T>(a, b, [](int c) { return c & S ? kN + c - S : c; });
  b = pick<T>(a, b, [](int c) { return c & S ? kN + c : c + S; });
  a = low;
}

template <class T, int S = 1>
FASTLOSS_INLINE void transpose(Vec<T>* rows) {
  constexpr int kN = Lanes<T>::kCount;
#pragma GCC unroll 16
  for (int i = 0; i < kN; ++i)
    if (!(i & S)) exchange<T, S>(rows[i], rows[i + S]);
  if constexpr (2 * S < kN) transpose<T, 2 * S>(rows);
}

template <class T, int A>
FASTLOSS_INLINE void read_tile(const T* x, int64_t d, int64_t columns, Vec<T>* out) {
  constexpr int kN = Lanes<T>::kCount;
  Vec<T> tile[kN];
#pragma GCC unroll 16
  for (int l = 0; l < kN; ++l) tile[l] = load(x + l * d);
  transpose<T>(tile);
  for (int64_t k = 0; k < columns; ++k) out[k * A] = tile[k];
}

// What a short row writes into the next is overwritten by it; the last rows of the block must not write beyond.
template <class T, int A>
FASTLOSS_INLINE void write_tile(T* y, int64_t d, int64_t columns, int64_t room, const Vec<T>* in) {
  constexpr int kN = Lanes<T>::kCount;
  Vec<T> tile[kN];
#pragma GCC unroll 16
  for (int k = 0; k < kN; ++k) tile[k] = k < columns ? in[k * A] : Vec<T>{};
  transpose<T>(tile);
#pragma GCC unroll 16
  for (int l = 0; l < kN; ++l)
    if (l * d + kN <= room)
      store(y + l * d, tile[l]);
    else
      store_some<T>(y + l * d, tile[l], int(columns));
}

// Lanes of four coefficients fill four vectors, and no lane is split: coefficient k of lane l is number 4 l + k of
// them.
template <class T, int A>
FASTLOSS_INLINE void read_fours(const T* x, Vec<T>* out) {
  constexpr int kN = Lanes<T>::kCount, kHalf = kN / 2;
  Vec<T> in[4], half[2][2];  // half[h][j]: coefficients 2 j and 2 j + 1 of half the lanes
  for (int i = 0; i < 4; ++i) in[i] = load(x + i * kN);
  for (int h = 0; h < 2; ++h)
    for (int j = 0; j < 2; ++j)
      half[h][j] = pick<T>(in[2 * h], in[2 * h + 1], [j](int c) { return 4 * (c % kHalf) + 2 * j + c / kHalf; });
  for (int j = 0; j < 2; ++j)
    for (int k = 0; k < 2; ++k)
      out[(2 * j + k) * A] =
          pick<T>(half[0][j], half[1][j], [k](int c) { return c % kHalf + k * kHalf + c / kHalf * kN; });
}

// Of each pair of the N vectors whose numbers differ in bit kBit alone, number(c, 0) and number(c, 1) make new ones.
template <class T, int N, int kBit, class F>
FASTLOSS_INLINE void each_pair(Vec<T>* v, const F& number) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    if (!(i & kBit)) {
      const Vec<T> low = pick<T>(v[i], v[i + kBit], [=](int c) { return number(c, 0); });
      v[i + kBit] = pick<T>(v[i], v[i + kBit], [=](int c) { return number(c, 1); });
      v[i] = low;
    }
}

// Vectors of one coefficient each, of all lanes, become vectors of N coefficients side by side, of kCount / N lanes
// each. Step S brings bit S of the coefficient's number into the place; the highest bit of the lane's gives way, and
// becomes bit S of the vector's number: in the end the lanes of a vector are its number with its bits reversed.
template <class T, int N, int S = 0>
FASTLOSS_INLINE void interleave(Vec<T>* v) {
  constexpr int kN = Lanes<T>::kCount, kBit = 1 << S;
  each_pair<T, N, kBit>(
      v, [](int c, int upper) { return (c & kBit ? kN : 0) + upper * kN / 2 + c / (2 * kBit) * kBit + c % kBit; });
  if constexpr (2 * kBit < N) interleave<T, N, S + 1>(v);
}

// The steps of `interleave` back, from S on.
template <class T, int N, int S>
FASTLOSS_INLINE void deinterleave(Vec<T>* v) {
  constexpr int kN = Lanes<T>::kCount, kBit = 1 << S;
  each_pair<T, N, kBit>(v, [](int c, int odd) {
    const int place = c % (kN / 2);
    return c / (kN / 2) * kN + place / kBit * 2 * kBit + place % kBit + odd * kBit;
  });
  if constexpr (S > 0) deinterleave<T, N, S - 1>(v);
}

constexpr int reversed(int number, int size) {
  int out = 0;
  for (int bit = 1; bit < size; bit *= 2) out = 2 * out + (number / bit & 1);
  return out;
}

template <class T, int A>
FASTLOSS_INLINE void write_fours(T* y, const Vec<T>* in) {
  Vec<T> v[4];
  for (int k = 0; k < 4; ++k) v[k] = in[k * A];
  interleave<T, 4>(v);
  for (int i = 0; i < 4; ++i) store(y + i * Lanes<T>::kCount, v[reversed(i, 4)]);
}

// Eight coefficients of two lanes in a vector, then the ninth between them. For vectors of sixteen.
template <class T, int A>
FASTLOSS_INLINE void write_nines(T* y, const Vec<T>* in) {
  constexpr int kN = Lanes<T>::kCount;
  Vec<T> v[8];
  for (int k = 0; k < 8; ++k) v[k] = in[k * A];
  interleave<T, 8>(v);
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i) {
    const int first = i * kN / 9 / 2, last = (i * kN + kN - 1) / 9 / 2;  // pairs of lanes
    const Vec<T> eight = pick<T>(v[reversed(first, 8)], v[reversed(last, 8)], [=](int c) {
      const int lane = (i * kN + c) / 9, k = (i * kN + c) % 9;
      return (lane / 2 - first) * kN + lane % 2 * 8 + k % 8;
    });
    store(y + i * kN, pick<T>(eight, in[8 * A], [=](int c) {
            const int lane = (i * kN + c) / 9, k = (i * kN + c) % 9;
            return k == 8 ? kN + lane : c;
          }));
  }
}

// `write_nines` back.
template <class T, int A>
FASTLOSS_INLINE void read_nines(const T* x, Vec<T>* out) {
  constexpr int kN = Lanes<T>::kCount;
  Vec<T> in[9], v[8];
  for (int i = 0; i < 9; ++i) in[i] = load(x + i * kN);
#pragma GCC unroll 8
  for (int pair = 0; pair < 8; ++pair) {
    const int first = 18 * pair / kN;
    v[reversed(pair, 8)] =
        pick<T>(in[first], in[first + 1], [=](int c) { return 18 * pair + c / 8 * 9 + c % 8 - first * kN; });
  }
  deinterleave<T, 8, 2>(v);
  for (int k = 0; k < 8; ++k) out[k * A] = v[k];
  Vec<T> ninth = in[0];
#pragma GCC unroll 8
  for (int i = 1; i < 9; ++i)
    ninth = pick<T>(ninth, in[i], [=](int lane) {
      const int place = 9 * lane + 8;
      return i == 1 && lane == 0 ? place : place / kN == i ? kN + place % kN : lane;
    });
  out[8 * A] = ninth;
}

// One block, of any shape.
template <class T, int A>
void read_block(const GauntProgram<T>& p, const T* x, int64_t d, int64_t lane, Vec<T>* out) {
  constexpr int kN = Lanes<T>::kCount;
  const int count = int(lesser(kN, p.lanes - lane));
  if (side_by_side(p, lane, count)) {
    x += offset_of(p, lane, d);
    for (int64_t i = 0; i < d; ++i) out[i * A] = load(x + i * p.channels);
    return;
  }
  const int64_t stride = p.channels ? p.channels : 1;
  T* flat = reinterpret_cast<T*>(out);
  for (int l = 0; l < kN; ++l) {
    const T* from = x + offset_of(p, lane + (l < count ? l : 0), d);  // missing lanes repeat the first
    for (int64_t i = 0; i < d; ++i) flat[i * A * kN + l] = from[i * stride];
  }
}

template <class T, int A>
void write_block(const GauntProgram<T>& p, T* y, int64_t d, int64_t lane, const Vec<T>* in) {
  constexpr int kN = Lanes<T>::kCount;
  const int count = int(lesser(kN, p.lanes - lane));
  if (side_by_side(p, lane, count)) {
    y += offset_of(p, lane, d);
    for (int64_t i = 0; i < d; ++i) store(y + i * p.channels, in[i * A]);
    return;
  }
  const int64_t stride = p.channels ? p.channels : 1;
  const T* flat = reinterpret_cast<const T*>(in);
  for (int l = 0; l < count; ++l) {
    T* to = y + offset_of(p, lane + l, d);
    for (int64_t i = 0; i < d; ++i) to[i * stride] = flat[i * A * kN + l];
  }
}

// Blocks from `lane` on: coefficient i of block n goes to out[A i + n].
template <class T, int A>
void read_lanes(const GauntProgram<T>& p, const T* x, int64_t d, int64_t lane, int64_t blocks, Vec<T>* out) {
  constexpr int kN = Lanes<T>::kCount;
  int64_t whole = 0;
  if (p.channels == 0) {
    // Rows of less than a vector are read with the beginning of the next, if there is one.
    const int64_t rows = d < kN ? (p.lanes * d - kN) / d + 1 : p.lanes;
    whole = p.lanes * d < kN ? 0 : greater(0, lesser(blocks, (rows - lane) / kN));
    const T* from = x + lane * d;
    const int64_t step = kN * d;
    auto each = [&](const auto& read) {
      for (int64_t n = 0; n < whole; ++n) read(from + n * step, out + n);
    };
    if (d == 1) {
      each([](const T* x, Vec<T>* out) { out[0] = load(x); });
    } else if (d == 4 && kN >= 4) {
      each([](const T* x, Vec<T>* out) { read_fours<T, A>(x, out); });
    } else if (d == 9 && kN == 16) {
      if constexpr (kN == 16) each([](const T* x, Vec<T>* out) { read_nines<T, A>(x, out); });
    } else if (d < kN) {
      each([d](const T* x, Vec<T>* out) { read_tile<T, A>(x, d, d, out); });
    } else {
      each([d](const T* x, Vec<T>* out) {
        for (int64_t i = 0; i < d; i += kN) {
          const int64_t first = lesser(i, d - kN);  // the last tile overlaps the one before
          read_tile<T, A>(x + first, d, kN, out + first * A);
        }
      });
    }
  }
  for (int64_t n = whole; n < blocks; ++n) read_block<T, A>(p, x, d, lane + n * kN, out + n);
}

template <class T, int A>
void write_lanes(const GauntProgram<T>& p, T* y, int64_t d, int64_t lane, int64_t blocks, const Vec<T>* in) {
  constexpr int kN = Lanes<T>::kCount;
  int64_t whole = 0;
  if (p.channels == 0) {
    whole = lesser(blocks, (p.lanes - lane) / kN);
    T* to = y + lane * d;
    const int64_t step = kN * d;
    auto each = [&](const auto& write) {
      for (int64_t n = 0; n < whole; ++n) write(to + n * step, in + n);
    };
    if (d == 1) {
      each([](T* y, const Vec<T>* in) { store(y, in[0]); });
    } else if (d == 4 && kN >= 4) {
      each([](T* y, const Vec<T>* in) { write_fours<T, A>(y, in); });
    } else if (d == 9 && kN == 16) {
      if constexpr (kN == 16) each([](T* y, const Vec<T>* in) { write_nines<T, A>(y, in); });
    } else if (d < kN) {
      each([d](T* y, const Vec<T>* in) { write_tile<T, A>(y, d, d, kN * d, in); });
    } else {
      each([d](T* y, const Vec<T>* in) {
        for (int64_t i = 0; i < d; i += kN) {
          const int64_t first = lesser(i, d - kN);
          write_tile<T, A>(y + first, d, kN, kN * d - first, in + first * A);
        }
      });
    }
  }
  for (int64_t n = whole; n < blocks; ++n) write_block<T, A>(p, y, d, lane + n * kN, in + n);
}

// Writes orders m and -m of a spectrum; `middle` is its order 0.
template <class T>
FASTLOSS_INLINE void put(Vec<T>* middle, int64_t m, Vec<T> cosine, Vec<T> sine) {
  middle[2 * m] = cosine;
  middle[2 * m + 1] = sine;
  middle[-2 * m] = cosine;
  middle[-2 * m + 1] = m ? -sine : sine;
}

template <class T>
FASTLOSS_INLINE void put_zeros(Vec<T>* middle, int64_t band) {
  for (int64_t m = band + 1; m <= band + kPad; ++m) put<T>(middle, m, Vec<T>{}, Vec<T>{});
}

// Spectra of one input on R pairs of rings: ring 2 r at +cos(theta), 2 r + 1 at -cos(theta).
template <class T, int R>
FASTLOSS_INLINE void to_rings(const GauntProgram<T>& p, const Vec<T>* x, int64_t l, int64_t pair, Vec<T>* spectra) {
  const int64_t row = (p.degree + 1) * (p.degree + 2) / 2, size = spectrum_size(l);
  Vec<T>* middle = spectra + size / 2 - 1;
  for (int64_t m = 0; m <= l; ++m) {
    const T* table = p.to_ring + pair * row + order_at(p.degree, m);
    Vec<T> even_c[R]{}, even_s[R]{}, odd_c[R]{}, odd_s[R]{};
    auto add = [&](int64_t n, Vec<T>* c, Vec<T>* s) {
      const Vec<T> xc = x[n * n + n + m], xs = x[n * n + n - m];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const T value = table[r * row + n - m];
        c[r] += xc * value;
        s[r] += xs * value;
      }
    };
    for (int64_t n = m; n <= l; n += 2) add(n, even_c, even_s);
    for (int64_t n = m + 1; n <= l; n += 2) add(n, odd_c, odd_s);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> none{};
      put<T>(middle + 2 * r * size, m, even_c[r] + odd_c[r], m ? even_s[r] + odd_s[r] : none);
      put<T>(middle + (2 * r + 1) * size, m, even_c[r] - odd_c[r], m ? even_s[r] - odd_s[r] : none);
    }
  }
}

// Orders k..k + N - 1 of the product of two spectra given by their middles; f(k, cosine, sine).
template <class T, int N, class F>
FASTLOSS_INLINE void multiply_tile(const Vec<T>* a, int64_t band_a, const Vec<T>* b, int64_t band_b, int64_t k,
                                   const F& f) {
  Vec<T> c[N]{}, s[N]{};
  const int64_t first = greater(-band_a, k - band_b), last = lesser(band_a, k + N - 1 + band_b);
  for (int64_t m = first; m <= last; ++m) {
    const Vec<T> ac = a[2 * m], as = a[2 * m + 1];
    const Vec<T>* other = b + 2 * (k - m);
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t) {
      const Vec<T> bc = other[2 * t], bs = other[2 * t + 1];
      c[t] += ac * bc;
      s[t] += ac * bs;
      c[t] -= as * bs;
      s[t] += as * bc;
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) f(k + t, c[t], s[t]);
}

// Orders 0..top.
template <class T, class F>
FASTLOSS_INLINE void multiply(const Vec<T>* a, int64_t band_a, const Vec<T>* b, int64_t band_b, int64_t top,
                              const F& f) {
  int64_t k = 0;
  for (; k + kTile <= top + 1; k += kTile) multiply_tile<T, kTile>(a, band_a, b, band_b, k, f);
  const int64_t left = top + 1 - k;
  if (left == 3) multiply_tile<T, 3>(a, band_a, b, band_b, k, f);
  if (left == 2) multiply_tile<T, 2>(a, band_a, b, band_b, k, f);
  if (left == 1) multiply_tile<T, 1>(a, band_a, b, band_b, k, f);
}

// Adds R pairs of rings, h (2 R, orders 0..band) of stride `size`, to the coefficients of one output.
template <class T, int R>
FASTLOSS_INLINE void from_rings(const GauntProgram<T>& p, const Vec<T>* h, int64_t size, bool equator, int64_t band,
                                int64_t l, int64_t pair, Vec<T>* y) {
  const int64_t row = (p.degree + 1) * (p.degree + 2) / 2;
  for (int64_t m = 0; m <= lesser(l, band); ++m) {
    const T* table = p.from_ring + pair * row + order_at(p.degree, m);
    Vec<T> even_c[R], even_s[R], odd_c[R], odd_s[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T>*north = h + 2 * r * size + 2 * m, *south = equator && r == R - 1 ? north : north + size;
      even_c[r] = north[0] + south[0];
      odd_c[r] = north[0] - south[0];
      even_s[r] = north[1] + south[1];
      odd_s[r] = north[1] - south[1];
    }
    auto add = [&](int64_t n, const Vec<T>* c, const Vec<T>* s) {
      Vec<T>*yc = y + n * n + n + m, *ys = y + n * n + n - m;
      Vec<T> sum_c = *yc, sum_s = *ys;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const T value = table[r * row + n - m];
        sum_c += c[r] * value;
        sum_s += s[r] * value;
      }
      if (m) *ys = sum_s;
      *yc = sum_c;
    };
    for (int64_t n = m; n <= l; n += 2) add(n, even_c, even_s);
    for (int64_t n = m + 1; n <= l; n += 2) add(n, odd_c, odd_s);
  }
}

// Scratch of one thread, in vectors.
template <class T>
struct Scratch {
  Vec<T>* inputs;      // coefficients of all inputs, one after the other, and by the sparse tensor a one
  Vec<T>* outputs;     // of all outputs
  Vec<T>* spectra;     // of all inputs, 2 kRingPairs rings each
  Vec<T>* partial[2];  // spectra of products of some of a term's factors
  Vec<T>* sums;        // (2 kRingPairs, band + 1): sums of terms
};

FASTLOSS_INLINE int64_t coefficients_of(const int64_t* degrees, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += square(degrees[i] + 1);
  return sum;
}

// Elements of T a thread works with.
template <class T>
int64_t room(const GauntProgram<T>& p) {
  int64_t vectors = coefficients_of(p.in_degree, p.inputs) + coefficients_of(p.out_degree, p.outputs);
  if (p.entries) {
    vectors = (vectors + 1) * kAbreast;
  } else {
    vectors += 2 * spectrum_size(p.band) + 2 * kRingPairs * 2 * (p.band + 1);
    for (int64_t i = 0; i < p.inputs; ++i) vectors += 2 * kRingPairs * spectrum_size(p.in_degree[i]);
  }
  return (vectors + 1) * Lanes<T>::kCount;
}

// All terms of one output on R pairs of rings, added to its coefficients. Returns where the next output's terms begin.
template <class T, int R>
FASTLOSS_INLINE const int64_t* add_output(const GauntProgram<T>& p, const Scratch<T>& at, const int64_t* term,
                                          const int64_t* spectrum_at, int64_t l, int64_t pair, Vec<T>* y) {
  const int64_t sums_size = 2 * (p.band + 1), count = *term++;
  const bool equator = p.equator && pair + R == p.pairs;  // both rings of the last pair are the same one
  const int rings = 2 * R - equator;
  auto spectrum_of = [&](int64_t i, int64_t ring) {
    const int64_t size = spectrum_size(p.in_degree[i]);
    return at.spectra + spectrum_at[i] + ring * size + size / 2 - 1;
  };
  int64_t top = -1;  // orders 0..top of the sums are set
  for (int64_t t = 0; t < count; ++t) {
    const T coefficient = T(term[0]);
    const int64_t factors = term[1];
    const int64_t* factor = term + 2;
    term += 2 + factors;
    int64_t band = 0;
    for (int64_t f = 0; f < factors; ++f) band += p.in_degree[factor[f]];
    const int64_t last = lesser(band, l), before = top;
    top = greater(top, last);
    for (int ring = 0; ring < rings; ++ring) {
      const Vec<T>* a = spectrum_of(factor[0], ring);
      int64_t band_a = p.in_degree[factor[0]], left = band - band_a;
      Vec<T>* sum = at.sums + ring * sums_size;
      auto set = [&](int64_t k, Vec<T> c, Vec<T> s) {
        sum[2 * k] = c * coefficient;
        sum[2 * k + 1] = s * coefficient;
      };
      auto add = [&](int64_t k, Vec<T> c, Vec<T> s) {
        if (k > before) {
          set(k, c, s);
        } else {
          sum[2 * k] += c * coefficient;
          sum[2 * k + 1] += s * coefficient;
        }
      };
      for (int64_t f = 1; f < factors; ++f) {
        const Vec<T>* b = spectrum_of(factor[f], ring);
        const int64_t band_b = p.in_degree[factor[f]];
        left -= band_b;
        if (f == factors - 1) {
          if (t == 0)
            multiply<T>(a, band_a, b, band_b, last, set);
          else
            multiply<T>(a, band_a, b, band_b, last, add);
        } else {  // orders above last + left do not reach the output
          const int64_t kept = lesser(band_a + band_b, last + left);
          Vec<T>* next = at.partial[f & 1] + spectrum_size(kept) / 2 - 1;
          multiply<T>(a, band_a, b, band_b, kept, [&](int64_t k, Vec<T> c, Vec<T> s) { put<T>(next, k, c, s); });
          put_zeros<T>(next, kept);
          a = next;
          band_a = kept;
        }
      }
      if (factors == 1)
        for (int64_t k = 0; k <= last; ++k) add(k, a[2 * k], a[2 * k + 1]);
    }
  }
  if (count) from_rings<T, R>(p, at.sums, sums_size, equator, top, l, pair, y);
  return term;
}

template <class T, int R>
void add_pairs(const GauntProgram<T>& p, const Scratch<T>& at, const int64_t* spectrum_at, int64_t pair) {
  const Vec<T>* x = at.inputs;
  for (int64_t i = 0; i < p.inputs; ++i) {
    to_rings<T, R>(p, x, p.in_degree[i], pair, at.spectra + spectrum_at[i]);
    x += square(p.in_degree[i] + 1);
  }
  const int64_t* term = p.terms;
  Vec<T>* y = at.outputs;
  for (int64_t o = 0; o < p.outputs; ++o) {
    term = add_output<T, R>(p, at, term, spectrum_at, p.out_degree[o], pair, y);
    y += square(p.out_degree[o] + 1);
  }
}

constexpr int64_t kMostInputs = 64;

// Coefficients of the outputs of kAbreast lane blocks by the entries of the Gaunt tensor.
template <class T>
void by_entries(const GauntProgram<T>& p, const Vec<T>* x, int64_t out_size, Vec<T>* y) {
  const GauntEntry<T>* entry = p.entries;
  for (int64_t k = 0; k < out_size; ++k, y += kAbreast) {
    Vec<T> sum[kAbreast]{};
    for (const GauntEntry<T>* end = entry + p.entry_counts[k]; entry < end; ++entry) {
      const Vec<T>*a = x + int64_t(entry->a) * kAbreast, *b = x + int64_t(entry->b) * kAbreast;
#pragma GCC unroll 4
      for (int n = 0; n < kAbreast; ++n) sum[n] += a[n] * b[n] * entry->value;
    }
#pragma GCC unroll 4
    for (int n = 0; n < kAbreast; ++n) y[n] = sum[n];
  }
}

template <class T>
void add_rings(const GauntProgram<T>& p, const Scratch<T>& at, const int64_t* spectrum_at) {
  int64_t pair = 0;
  for (; pair + kRingPairs <= p.pairs; pair += kRingPairs) add_pairs<T, kRingPairs>(p, at, spectrum_at, pair);
  switch (p.pairs - pair) {
    case 1:
      add_pairs<T, 1>(p, at, spectrum_at, pair);
      break;
    case 2:
      add_pairs<T, 2>(p, at, spectrum_at, pair);
      break;
    case 3:
      add_pairs<T, 3>(p, at, spectrum_at, pair);
      break;
  }
}

// Reads, computes and writes lane blocks begin..end, A at a time; compute(inputs, outputs).
template <class T, int A, class F>
FASTLOSS_INLINE void each_block(const GauntProgram<T>& p, const Scratch<T>& at, int64_t begin, int64_t end,
                                const F& compute) {
  constexpr int kN = Lanes<T>::kCount;
  for (int64_t block = begin; block < end; block += A) {
    const int64_t blocks = lesser(A, end - block);
    const int64_t lane = block * kN;
    Vec<T>* x = at.inputs;
    for (int64_t i = 0; i < p.inputs; ++i) {
      const int64_t d = square(p.in_degree[i] + 1);
      read_lanes<T, A>(p, p.x[i], d, lane, blocks, x);
      x += d * A;
    }
    compute(at.inputs, at.outputs);
    const Vec<T>* y = at.outputs;
    for (int64_t o = 0; o < p.outputs; ++o) {
      const int64_t d = square(p.out_degree[o] + 1);
      write_lanes<T, A>(p, p.y[o], d, lane, blocks, y);
      y += d * A;
    }
  }
}

template <class T>
void run_blocks(const GauntProgram<T>& p, T* memory, int64_t begin, int64_t end) {
  const uintptr_t address = (reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64;
  Vec<T>* next = reinterpret_cast<Vec<T>*>(address);
  auto take = [&](int64_t vectors) {
    Vec<T>* taken = next;
    next += vectors;
    return taken;
  };
  const int64_t in_size = coefficients_of(p.in_degree, p.inputs), out_size = coefficients_of(p.out_degree, p.outputs);
  Scratch<T> at;
  if (p.entries) {
    at.inputs = take((in_size + 1) * kAbreast);
    at.outputs = take(out_size * kAbreast);
    for (int64_t i = 0; i < in_size * kAbreast; ++i) at.inputs[i] = Vec<T>{};  // of blocks that are not there
    for (int n = 0; n < kAbreast; ++n) at.inputs[in_size * kAbreast + n] = splat<T>(1);
    each_block<T, kAbreast>(p, at, begin, end, [&](const Vec<T>* x, Vec<T>* y) { by_entries(p, x, out_size, y); });
    return;
  }
  at.inputs = take(in_size);
  at.outputs = take(out_size);
  int64_t spectrum_at[kMostInputs];
  int64_t spectra = 0;
  for (int64_t i = 0; i < p.inputs; ++i) {
    spectrum_at[i] = spectra;
    spectra += 2 * kRingPairs * spectrum_size(p.in_degree[i]);
  }
  at.spectra = take(spectra);
  at.partial[0] = take(spectrum_size(p.band));
  at.partial[1] = take(spectrum_size(p.band));
  at.sums = take(2 * kRingPairs * 2 * (p.band + 1));
  for (int64_t i = 0; i < p.inputs; ++i) {  // the zeros beside the spectra stay
    const int64_t size = spectrum_size(p.in_degree[i]);
    for (int64_t ring = 0; ring < 2 * kRingPairs; ++ring)
      put_zeros<T>(at.spectra + spectrum_at[i] + ring * size + size / 2 - 1, p.in_degree[i]);
  }
  each_block<T, 1>(p, at, begin, end, [&](const Vec<T>*, Vec<T>* y) {
    for (int64_t i = 0; i < out_size; ++i) y[i] = Vec<T>{};
    add_rings(p, at, spectrum_at);
  });
}

// What fits is on the stack: to ask for memory takes a small call as long as its work.
constexpr int64_t kStackBytes = 32 << 10;

template <class T>
int64_t scratch(const GauntProgram<T>& p) {
  const int64_t size = room(p);
  return size * int64_t(sizeof(T)) <= kStackBytes ? 0 : size;
}

template <class T>
void run_blocks_on_stack(const GauntProgram<T>& p, int64_t begin, int64_t end) {
  alignas(64) T memory[kStackBytes / sizeof(T)];
  run_blocks(p, memory, begin, end);
}

template <class T>
void run(const GauntProgram<T>& p, T* memory, int threads) {
  const int64_t blocks = (p.lanes + Lanes<T>::kCount - 1) / Lanes<T>::kCount, size = scratch(p);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t begin = blocks * t / threads, end = blocks * (t + 1) / threads;
    if (size)
      run_blocks(p, memory + t * size, begin, end);
    else
      run_blocks_on_stack(p, begin, end);
  }
}

}  // namespace

namespace fastloss {
namespace cpu {
namespace FASTLOSS_ISA {

extern const GauntKernels<float> gaunt_float;
extern const GauntKernels<double> gaunt_double;
const GauntKernels<float> gaunt_float = {scratch<float>, run<float>};
const GauntKernels<double> gaunt_double = {scratch<double>, run<double>};

}  // namespace FASTLOSS_ISA
}  // namespace cpu
}  // namespace fastloss
