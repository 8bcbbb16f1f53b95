// Products of functions on the sphere, ring of latitude by ring of latitude. Raw pointers and sizes only.
//
// A function of degree L is given by (L + 1)^2 real spherical-harmonic coefficients, index l^2 + l + m. On a ring it is
// the trigonometric polynomial sum_m F_m e^(i m phi), |m| <= L: the coefficients of one order m, summed over l with the
// associated Legendre functions. Products are convolutions of those short series; the way back is a quadrature over the
// rings. Rings come in pairs at +-cos(theta), which share the sums over even and odd l + m.
#pragma once

#include <stdint.h>

namespace fastloss {
namespace cpu {

// Pairs of rings handled together.
constexpr int64_t kRingPairs = 4;

// One product of two coefficients in a sum, with its entry of the Gaunt tensor.
template <class T>
struct GauntEntry {
  int32_t a, b;  // places among the coefficients of all inputs, one after the other, and a one behind them
  T value;
};

template <class T>
struct GauntProgram {
  int64_t lanes;              // functions in each tensor
  int64_t channels;           // 0: tensors are (lanes, d); else (lanes / channels, d, channels)
  int64_t inputs, outputs;    // tensors
  const T* const* x;          // (inputs,)
  T* const* y;                // (outputs,), written whole
  const int64_t* in_degree;   // (inputs,)
  const int64_t* out_degree;  // (outputs,)
  // Output by output: the number of its terms, then for each term an integer coefficient, the number of factors (at
  // least 1) and the inputs that are its factors.
  const int64_t* terms;
  // By the sparse Gaunt tensor: the entries of each coefficient of each output, one after the other. Null: by rings.
  const GauntEntry<T>* entries;
  const int64_t* entry_counts;  // (coefficients of all outputs,)
  // By rings.
  int64_t degree;      // of the tables, at least every degree above
  int64_t band;        // at least the sum of the degrees of the factors of any term
  int64_t pairs;       // of rings
  bool equator;        // the last pair is one ring, at cos(theta) = 0, with half its weight for each of the two
  const T* to_ring;    // (pairs, (degree + 1) (degree + 2) / 2), order by order
  const T* from_ring;  // the same, with the quadrature's weights
};

template <class T>
struct GauntKernels {
  int64_t (*scratch)(const GauntProgram<T>& program);  // elements of T a thread needs, or 0
  void (*run)(const GauntProgram<T>& program, T* scratch, int threads);
};

}  // namespace cpu
}  // namespace fastloss
