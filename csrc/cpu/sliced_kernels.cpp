// Compiled once per instruction set, with FASTLOSS_ISA naming the namespace. Everything but the two tables has
// internal linkage: no code for a newer processor can leak into the baseline through a weak symbol.
#include "simd.h"
#include "sliced.h"

namespace {

template <class T>
struct Word;
template <>
struct Word<float> {
  typedef uint32_t Type;
  typedef uint32_t Alias __attribute__((may_alias));
};
template <>
struct Word<double> {
  typedef uint64_t Type;
  typedef uint64_t Alias __attribute__((may_alias));
};

constexpr double kInf = __builtin_huge_val();
constexpr double kNan = __builtin_nan("");
constexpr int kMaxDigit = 11;
constexpr int64_t kAlign = 64;

FASTLOSS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FASTLOSS_INLINE int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// ---------------------------------------------------------------- sorting

// Buffers of one thread for rows of at most n atoms.
template <class T>
struct Buffers {
  uint32_t* codes;   // n
  void* moving;      // n words of T
  uint32_t* counts;  // 2 * 2^kMaxDigit
};

template <class T>
struct Range {
  T low, high;
  bool nan;
};

template <class T>
Range<T> range_of(const T* x, int64_t n) {
  constexpr int kN = Lanes<T>::kCount;
  T low = x[0], high = x[0];
  bool nan = false;
  int64_t i = 0;
  if (n >= kN) {
    Vec<T> lows = load(x), highs = lows;
    Bits<T> unordered{};
    for (; i + kN <= n; i += kN) {
      const Vec<T> v = load(x + i);
      lows = v < lows ? v : lows;
      highs = v > highs ? v : highs;
      unordered |= v != v;
    }
    for (int l = 0; l < kN; ++l) {
      low = lows[l] < low ? lows[l] : low;
      high = highs[l] > high ? highs[l] : high;
      nan |= unordered[l] != 0;
    }
  }
  for (; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    nan |= x[i] != x[i];
  }
  return {low, high, nan};
}

// Moves atoms that are out of order towards the front; `order` may be null. False once that took more moves than a
// nearly sorted row needs.
template <class T, bool kOrder>
bool finish_by_insertion(T* key, int32_t* order, int64_t n) {
  int64_t budget = 8 * n + 256;
  for (int64_t i = 1; i < n; ++i) {
    const T k = key[i];
    if (!(k < key[i - 1])) continue;
    const int32_t from = kOrder ? order[i] : 0;
    int64_t j = i;
    do {
      key[j] = key[j - 1];
      if constexpr (kOrder) order[j] = order[j - 1];
      --j;
    } while (j > 0 && k < key[j - 1]);
    key[j] = k;
    if constexpr (kOrder) order[j] = from;
    budget -= i - j;
    if (budget < 0) return false;
  }
  return true;
}

// Least significant byte first, on bit patterns whose unsigned order is that of the numbers: any distribution.
template <class T, bool kOrder>
void sort_by_bytes(const T* x, int64_t n, T* key, int32_t* order, Buffers<T> buffers) {
  using W = typename Word<T>::Type;
  using A = typename Word<T>::Alias;
  constexpr int kBits = 8 * int(sizeof(T)), kPasses = int(sizeof(T));
  constexpr W kSign = W(1) << (kBits - 1);
  A* keys[2] = {reinterpret_cast<A*>(key), static_cast<A*>(buffers.moving)};
  typedef int32_t Index __attribute__((may_alias));
  Index* orders[2] = {reinterpret_cast<Index*>(order), reinterpret_cast<Index*>(buffers.codes)};
  for (int64_t i = 0; i < n; ++i) {
    const T v = x[i] + T(0);  // -0 and 0 are equal
    W w;
    __builtin_memcpy(&w, &v, sizeof(w));
    keys[0][i] = w & kSign ? W(~w) : W(w | kSign);
    if constexpr (kOrder) orders[0][i] = int32_t(i);
  }
  int at = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const A* from = keys[at];
    A* to = keys[1 - at];
    const int shift = 8 * pass;
    uint32_t* counts = buffers.counts;
    for (int b = 0; b < 256; ++b) counts[b] = 0;
    for (int64_t i = 0; i < n; ++i) ++counts[(from[i] >> shift) & 255];
    uint32_t sum = 0;
    bool constant = false;
    for (int b = 0; b < 256; ++b) {
      const uint32_t count = counts[b];
      constant |= count == uint32_t(n);
      counts[b] = sum;
      sum += count;
    }
    if (constant) continue;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t place = counts[(from[i] >> shift) & 255]++;
      to[place] = from[i];
      if constexpr (kOrder) orders[1 - at][place] = orders[at][i];
    }
    at = 1 - at;
  }
  for (int64_t i = 0; i < n; ++i) {
    const W w = keys[at][i];
    const W back = w & kSign ? W(w & ~kSign) : W(~w);
    T v;
    __builtin_memcpy(&v, &back, sizeof(v));
    const int32_t from = kOrder ? orders[at][i] : 0;
    key[i] = v;
    if constexpr (kOrder) order[i] = from;
  }
}

FASTLOSS_INLINE int bits_of(uint64_t n) { return n == 0 ? 0 : 64 - __builtin_clzll(n); }

FASTLOSS_INLINE void start_of_buckets(uint32_t* counts, int64_t buckets) {
  uint32_t sum = 0;
  for (int64_t b = 0; b < buckets; ++b) {
    const uint32_t count = counts[b];
    counts[b] = sum;
    sum += count;
  }
}

// Stable ascending sort. (x - low) * scale, rounded down, is monotone in x: two counting passes over such codes, with
// about sixteen of them an atom, leave few atoms out of place, whatever the distribution's shape; an insertion sort
// finishes. Where codes do not tell the atoms apart (outliers, infinities), bytes do. With `order`, the first pass
// moves half a code and an index in 32 bits, the second indices alone.
template <class T, bool kOrder>
void sort_row(const T* x, int64_t n, Range<T> range, T* key, int32_t* order, Buffers<T> buffers) {
  const int index_bits = bits_of(uint64_t(n - 1));
  int bits = index_bits + 4;
  bits = bits > 2 * kMaxDigit ? 2 * kMaxDigit : bits;
  const int low_bits = bits / 2, high_bits = bits - low_bits;
  const T width = range.high - range.low;
  const T scale = T((int64_t(1) << bits) - 1) / width;
  const bool codes_work = n >= 32 && scale < T(kInf) && scale > 0 && index_bits + high_bits <= 32;
  if (!codes_work) {
    if (n < 32 || width == 0) {
      for (int64_t i = 0; i < n; ++i) key[i] = x[i];
      if constexpr (kOrder)
        for (int64_t i = 0; i < n; ++i) order[i] = int32_t(i);
      if (finish_by_insertion<T, kOrder>(key, order, n)) return;
    }
    return sort_by_bytes<T, kOrder>(x, n, key, order, buffers);
  }
  uint32_t *low_counts = buffers.counts, *high_counts = low_counts + (1 << kMaxDigit);
  for (int b = 0; b < 1 << low_bits; ++b) low_counts[b] = 0;
  for (int b = 0; b < 1 << high_bits; ++b) high_counts[b] = 0;
  const uint32_t low_mask = (1u << low_bits) - 1;
  uint32_t* codes = buffers.codes;
  for (int64_t i = 0; i < n; ++i) codes[i] = uint32_t(int32_t((x[i] - range.low) * scale));
  for (int64_t i = 0; i < n; ++i) {
    ++low_counts[codes[i] & low_mask];
    ++high_counts[codes[i] >> low_bits];
  }
  start_of_buckets(low_counts, 1 << low_bits);
  start_of_buckets(high_counts, 1 << high_bits);
  if constexpr (kOrder) {
    uint32_t* moving = static_cast<uint32_t*>(buffers.moving);
    for (int64_t i = 0; i < n; ++i)
      moving[low_counts[codes[i] & low_mask]++] = codes[i] >> low_bits << index_bits | uint32_t(i);
    const uint32_t index_mask = uint32_t((uint64_t(1) << index_bits) - 1);
    for (int64_t i = 0; i < n; ++i) order[high_counts[moving[i] >> index_bits]++] = int32_t(moving[i] & index_mask);
    for (int64_t i = 0; i < n; ++i) key[i] = x[order[i]];
  } else {
    T* moving = static_cast<T*>(buffers.moving);
    for (int64_t i = 0; i < n; ++i) moving[low_counts[codes[i] & low_mask]++] = x[i];
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t code = uint32_t(int32_t((moving[i] - range.low) * scale));
      key[high_counts[code >> low_bits]++] = moving[i];
    }
  }
  if (!finish_by_insertion<T, kOrder>(key, order, n)) sort_by_bytes<T, kOrder>(x, n, key, order, buffers);
}

// ---------------------------------------------------------------- powers

using Doubles = Vec<double>;

// |d|^p for 0 < p; the exponent's part of p log2 |d| is kept apart, so that no digits are lost for large and small d.
// What is rounded is the whole of it: the parts of a power out of range may be infinite and zero, their product NaN.
FASTLOSS_INLINE Doubles power(Doubles d, double p) {
  typedef Bits<double> Longs;
  Doubles x = d < 0 ? -d : d;
  const Longs tiny = x < 0x1p-1000;
  Doubles scaled = tiny ? x * 0x1p200 : x;
  Longs bits = reinterpret_cast<Longs>(scaled);
  // mantissa in [sqrt(1/2), sqrt(2))
  const Longs shifted = bits - 0x3fe6a09e667f3bcd;
  const Longs exponent = (shifted >> 52) - (tiny ? Longs{} + 200 : Longs{});
  const Doubles mantissa = reinterpret_cast<Doubles>(bits - ((shifted >> 52) << 52));
  const Doubles s = (mantissa - 1.0) / (mantissa + 1.0), t = s * s;
  Doubles series = splat<double>(1.0 / 27);
#pragma GCC unroll 16
  for (int k = 25; k >= 1; k -= 2) series = series * t + 1.0 / k;
  const Doubles log2 = series * s * 2.8853900817779268147;  // 2 / ln 2
  const Doubles whole = __builtin_convertvector(exponent, Doubles);
  const Doubles product = whole * p;
  const Doubles rounded = ((product + p * log2) + Lanes<double>::kRound) - Lanes<double>::kRound;
  Doubles rest;
  for (int l = 0; l < Lanes<double>::kCount; ++l) rest[l] = __builtin_fma(whole[l], p, -product[l]);
  Doubles result = exp2<double>((product - rounded) + (rest + p * log2)) * exp2<double>(rounded);
  result = x == 0 ? Doubles{} : result;
  result = x == kInf ? x : result;
  return x == x ? result : x;
}

// Cost and p-free derivative: |d|^p and sign(d) |d|^(p-1). P = 0: any p >= 1.
template <int P>
struct Cost {
  double value, slope;
};

template <int P>
FASTLOSS_INLINE Cost<P> cost_of(double d, double p) {
  if constexpr (P == 1) {
    return {d < 0 ? -d : d, d > 0 ? 1.0 : d < 0 ? -1.0 : d};
  } else if constexpr (P == 2) {
    return {d * d, d};
  } else {
    Doubles v{};
    v[0] = d;
    const double slope = power(v, p - 1)[0];
    return {slope * (d < 0 ? -d : d), d < 0 ? -slope : slope};
  }
}

// ---------------------------------------------------------------- pairing

// Sum of |u_i - v_i|^p; the slopes times `factor` overwrite u if kSlope.
template <class T, int P, bool kSlope>
double pair_equal(T* u, const T* v, int64_t n, double p, double factor) {
  constexpr int kN = Lanes<T>::kCount;
  constexpr int64_t kBlock = 1024;  // sums of a block in T, of the blocks in double
  double total = 0;
  if constexpr (P == 0) {
    constexpr int kD = Lanes<double>::kCount;
    for (int64_t i = 0; i < n; i += kD) {
      const int count = n - i < kD ? int(n - i) : kD;
      Doubles d{};
      for (int l = 0; l < count; ++l) d[l] = double(u[i + l]) - double(v[i + l]);
      const Doubles slope = power(d, p - 1);
      const Doubles value = slope * (d < 0 ? -d : d);
      for (int l = 0; l < count; ++l) total += value[l];
      if constexpr (kSlope)
        for (int l = 0; l < count; ++l) u[i + l] = T(factor * (d[l] < 0 ? -slope[l] : slope[l]));
    }
    return total;
  }
  const T scale = T(factor);
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t end = n < block + kBlock ? n : block + kBlock;
    Vec<T> sum{};
    int64_t i = block;
    for (; i + kN <= end; i += kN) {
      const Vec<T> d = load(u + i) - load(v + i);
      if constexpr (P == 2) {
        sum += d * d;
        if constexpr (kSlope) store<T>(u + i, d * scale);
      } else {
        sum += d < 0 ? -d : d;
        if constexpr (kSlope) {
          const Vec<T> sign = d > 0 ? splat<T>(1) : d < 0 ? splat<T>(-1) : d;
          store<T>(u + i, sign * scale);
        }
      }
    }
    total += double(sum_of<T>(sum));
    for (; i < end; ++i) {
      const T d = u[i] - v[i];
      const Cost<P> c = cost_of<P>(double(d), p);
      total += c.value;
      if constexpr (kSlope) u[i] = T(c.slope) * scale;
    }
  }
  return total;
}

// Where one side of a merge stands: the atom, and the cumulative weight at its end.
struct Side {
  const double* weights;  // in the order of the row, null for equal ones
  const int32_t* order;
  int64_t size, at;
  double end;
  int64_t last;  // the last atom of positive weight

  FASTLOSS_INLINE void start() {
    at = 0;
    end = 0;
    last = size - 1;
    if (weights)
      while (last > 0 && !(weights[order[last]] > 0)) --last;
    settle();
  }

  FASTLOSS_INLINE void settle() {
    if (at >= last)
      end = 1.0;  // it takes what rounding left over, and no infinite atom without weight beyond it
    else if (weights)
      end += weights[order[at]];
    else
      end = double(at + 1) / double(size);  // equal fractions are equal numbers, so ties are seen
  }
};

// Walks the staircase of the monotone coupling of sorted u and v.
template <class T, int P, bool kSlope>
double pair_merge(const T* u, const T* v, Side x, Side y, double p, double factor, T* gx, T* gy, T* f, T* g) {
  double total = 0, reached = 0, slope_x = 0, slope_y = 0, potential_x = 0, potential_y = 0;
  x.start();
  y.start();
  if (f) f[x.order[0]] = 0;
  if (g) g[y.order[0]] = 0;
  auto cost = [&](int64_t i, int64_t j) { return cost_of<P>(double(u[i]) - double(v[j]), p).value; };
  // Past its last atom a side stays there: a breakpoint of the other still separates two atoms of its own.
  auto next = [](const Side& s) { return s.at + 1 < s.size ? s.at + 1 : s.at; };
  while (x.at < x.size && y.at < y.size) {
    const double end = x.end < y.end ? x.end : y.end;
    const double mass = end > reached ? end - reached : 0;
    const Cost<P> c = cost_of<P>(double(u[x.at]) - double(v[y.at]), p);
    if (mass > 0) total += mass * c.value;  // no mass, no cost, infinite or not
    if constexpr (kSlope) {
      const double s = mass > 0 ? mass * c.slope : 0;
      slope_x += s;
      slope_y -= s;
    }
    reached = mass > 0 ? end : reached;
    const bool step_x = x.end <= y.end, step_y = y.end <= x.end;
    if constexpr (kSlope) {
      // Increments of the potentials; where both sides step at once, the mean of the two ways around the corner.
      if (f && step_x && x.at + 1 < x.size) {
        const int64_t i = x.at, j = y.at, j2 = step_y ? next(y) : j;
        potential_x += (cost(i + 1, j) - cost(i, j) + cost(i + 1, j2) - cost(i, j2)) / 2;
        f[x.order[i + 1]] = T(potential_x);
      }
      if (g && step_y && y.at + 1 < y.size) {
        const int64_t i = x.at, j = y.at, i2 = step_x ? next(x) : i;
        potential_y += (cost(i, j + 1) - cost(i, j) + cost(i2, j + 1) - cost(i2, j)) / 2;
        g[y.order[j + 1]] = T(potential_y);
      }
    }
    if (step_x) {
      if constexpr (kSlope)
        if (gx) gx[x.order[x.at]] = T(factor * slope_x);
      slope_x = 0;
      ++x.at;
      x.settle();
    }
    if (step_y) {
      if constexpr (kSlope)
        if (gy) gy[y.order[y.at]] = T(factor * slope_y);
      slope_y = 0;
      ++y.at;
      y.settle();
    }
  }
  if constexpr (kSlope) {
    // Atoms beyond the end of the mass (weight zero up to rounding).
    for (int64_t i = x.at; i < x.size; ++i) {
      if (gx) gx[x.order[i]] = i == x.at ? T(factor * slope_x) : T(0);
      if (f && i > x.at) {
        potential_x += cost(i, y.size - 1) - cost(i - 1, y.size - 1);
        f[x.order[i]] = T(potential_x);
      }
    }
    for (int64_t j = y.at; j < y.size; ++j) {
      if (gy) gy[y.order[j]] = j == y.at ? T(factor * slope_y) : T(0);
      if (g && j > y.at) {
        potential_y += cost(x.size - 1, j) - cost(x.size - 1, j - 1);
        g[y.order[j]] = T(potential_y);
      }
    }
  }
  return total;
}

template <class T>
void centre(T* f, int64_t n, const double* weights, double factor) {
  double mean = 0;
  if (weights)
    for (int64_t i = 0; i < n; ++i) mean += weights[i] * double(f[i]);
  else
    for (int64_t i = 0; i < n; ++i) mean += double(f[i]) / double(n);
  for (int64_t i = 0; i < n; ++i) f[i] = T(factor * (double(f[i]) - mean));
}

template <class T>
void fill(T* x, int64_t n, T value) {
  if (x)
    for (int64_t i = 0; i < n; ++i) x[i] = value;
}

// ---------------------------------------------------------------- rows

template <class T>
struct Scratch {
  T *u, *v;
  int32_t *u_order, *v_order;
  Buffers<T> buffers;

  static int64_t bytes(int64_t n, int64_t m) {
    const int64_t most = larger(n, m), word = int64_t(sizeof(T));
    return aligned(n * word) + aligned(m * word) + aligned(n * 4) + aligned(m * 4) + aligned(most * 4) +
           aligned(most * word) + aligned(int64_t(2) * 4 << kMaxDigit);
  }

  Scratch(char* p, int64_t n, int64_t m) {
    const int64_t most = larger(n, m), word = int64_t(sizeof(T));
    auto take = [&](int64_t size) {
      char* start = p;
      p += aligned(size);
      return static_cast<void*>(start);
    };
    u = static_cast<T*>(take(n * word));
    v = static_cast<T*>(take(m * word));
    u_order = static_cast<int32_t*>(take(n * 4));
    v_order = static_cast<int32_t*>(take(m * 4));
    buffers.codes = static_cast<uint32_t*>(take(most * 4));
    buffers.moving = take(most * word);
    buffers.counts = static_cast<uint32_t*>(take(int64_t(2) * 4 << kMaxDigit));
  }
};

template <class T, int P>
double transport_row(T* x, T* y, int64_t n, int64_t m, const double* a, const double* b, double p, const double* factor,
                     bool want_x, bool want_y, T* f, T* g, Scratch<T> s) {
  const Range<T> range_x = range_of(x, n), range_y = range_of(y, m);
  if (range_x.nan || range_y.nan) {
    if (factor) {
      if (want_x) fill(x, n, T(kNan));
      if (want_y) fill(y, m, T(kNan));
      fill(f, n, T(kNan));
      fill(g, m, T(kNan));
    }
    return kNan;
  }
  const bool equal = n == m && !a && !b;
  if (equal && !factor) {
    sort_row<T, false>(x, n, range_x, s.u, nullptr, s.buffers);
    sort_row<T, false>(y, m, range_y, s.v, nullptr, s.buffers);
    return pair_equal<T, P, false>(s.u, s.v, n, p, 0) / double(n);
  }
  const bool order_x = a || factor, order_y = b || factor;
  if (order_x)
    sort_row<T, true>(x, n, range_x, s.u, s.u_order, s.buffers);
  else
    sort_row<T, false>(x, n, range_x, s.u, nullptr, s.buffers);
  if (order_y)
    sort_row<T, true>(y, m, range_y, s.v, s.v_order, s.buffers);
  else
    sort_row<T, false>(y, m, range_y, s.v, nullptr, s.buffers);
  const Side side_x{a, s.u_order, n, 0, 0, 0}, side_y{b, s.v_order, m, 0, 0, 0};
  if (!factor) return pair_merge<T, P, false>(s.u, s.v, side_x, side_y, p, 0, nullptr, nullptr, nullptr, nullptr);
  if (equal && !f && !g) {
    const double total = pair_equal<T, P, true>(s.u, s.v, n, p, *factor * p / double(n));
    if (want_x)
      for (int64_t i = 0; i < n; ++i) x[s.u_order[i]] = s.u[i];
    if (want_y)
      for (int64_t i = 0; i < n; ++i) y[s.v_order[i]] = -s.u[i];
    return total / double(n);
  }
  const double total = pair_merge<T, P, true>(s.u, s.v, side_x, side_y, p, *factor * p, want_x ? x : nullptr,
                                              want_y ? y : nullptr, f, g);
  if (f) centre(f, n, a, *factor);
  if (g) centre(g, m, b, *factor);
  return total;
}

// The next slice that nobody has taken. Each slice's result is its own, so it does not matter who takes it; a thread
// that wakes late, or whose core is busy elsewhere, takes fewer.
FASTLOSS_INLINE int64_t take(int64_t& next) { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }

template <class T>
void transport(T* x, T* y, int64_t slices, int64_t n, int64_t m, const double* a, const double* b, double p,
               const double* factor, bool want_x, bool want_y, T* f, T* g, double* cost, void* scratch, int threads) {
  const int64_t stride = Scratch<T>::bytes(n, m);
  int64_t next = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    const Scratch<T> own(static_cast<char*>(scratch) + t * stride, n, m);
    for (int64_t s = take(next); s < slices; s = take(next)) {
      const double* scale = factor ? factor + s : nullptr;
      T* fs = f ? f + s * n : nullptr;
      T* gs = g ? g + s * m : nullptr;
      auto row = p == 1 ? transport_row<T, 1> : p == 2 ? transport_row<T, 2> : transport_row<T, 0>;
      cost[s] = row(x + s * n, y + s * m, n, m, a, b, p, scale, want_x, want_y, fs, gs, own);
    }
  }
}

template <class T>
void sort(const T* x, int64_t slices, int64_t n, T* sorted, int32_t* order, void* scratch, int threads) {
  const int64_t stride = Scratch<T>::bytes(n, n);
  int64_t next = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    const Scratch<T> own(static_cast<char*>(scratch) + t * stride, n, n);
    for (int64_t s = take(next); s < slices; s = take(next)) {
      const Range<T> range = range_of(x + s * n, n);
      if (range.nan) {
        fill(sorted + s * n, n, T(kNan));
        for (int64_t i = 0; i < n; ++i) order[s * n + i] = int32_t(i);
      } else {
        sort_row<T, true>(x + s * n, n, range, sorted + s * n, order + s * n, own.buffers);
      }
    }
  }
}

template <class T>
int64_t scratch_bytes(int64_t n, int64_t m, int threads) {
  return threads * Scratch<T>::bytes(n, m);
}

}  // namespace

namespace fastloss {
namespace cpu {
namespace FASTLOSS_ISA {

extern const SlicedKernels<float> sliced_float;
extern const SlicedKernels<double> sliced_double;
const SlicedKernels<float> sliced_float{transport<float>, sort<float>, scratch_bytes<float>};
const SlicedKernels<double> sliced_double{transport<double>, sort<double>, scratch_bytes<double>};

}  // namespace FASTLOSS_ISA
}  // namespace cpu
}  // namespace fastloss
