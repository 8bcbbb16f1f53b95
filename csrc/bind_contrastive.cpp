#include "bind.h"
#include "cpu/contrastive.h"
#include "cpu/isa.h"

using fastloss::Address;
using fastloss::at;
using fastloss::cpu::Mask;
using fastloss::cpu::Scale;

namespace {

Mask mask_of(std::int64_t diagonal, Address row_ids, Address col_ids) {
  return {diagonal, at<const std::int64_t>(row_ids), at<const std::int64_t>(col_ids)};
}

template <class T>
Scale<T> scale_of(Address values, bool single) {
  return {at<const T>(values), single};
}

template <class T>
const fastloss::cpu::ContrastiveKernels<T>& kernels() {
  return fastloss::cpu::chosen_table<fastloss::cpu::ContrastiveKernels<T>>();
}

template <class T>
void lse_tile(Address c, std::int64_t rows, std::int64_t cols, Address row_scale, bool one_row_scale, Address col_scale,
              bool one_col_scale, std::int64_t diagonal, Address row_ids, Address col_ids, Address row_max,
              Address row_sum, Address col_max, Address col_sum, Address partials, int threads) {
  kernels<T>().lse_tile(at<T>(c), rows, cols, scale_of<T>(row_scale, one_row_scale),
                        scale_of<T>(col_scale, one_col_scale), mask_of(diagonal, row_ids, col_ids), at<T>(row_max),
                        at<T>(row_sum), at<T>(col_max), at<T>(col_sum), at<T>(partials), threads);
}

template <class T>
void grad_tile(Address c, Address g, std::int64_t rows, std::int64_t cols, Address row_scale, bool one_row_scale,
               Address row_shift, Address row_weight, Address col_scale, bool one_col_scale, Address col_shift,
               Address col_weight, std::int64_t diagonal, Address row_ids, Address col_ids, Address row_dot,
               Address col_dot, Address partials, int threads) {
  kernels<T>().grad_tile(at<T>(c), at<T>(g), rows, cols, scale_of<T>(row_scale, one_row_scale), at<T>(row_shift),
                         at<T>(row_weight), scale_of<T>(col_scale, one_col_scale), at<T>(col_shift), at<T>(col_weight),
                         mask_of(diagonal, row_ids, col_ids), at<T>(row_dot), at<T>(col_dot), at<T>(partials), threads);
}

template <class T>
void turn(Address max, Address sum, Address scale, bool one_scale, Address diagonal, std::int64_t n, int directions,
          Address shift, Address weight, Address factor, Address slope, Address total) {
  kernels<T>().turn(at<const T>(max), at<const T>(sum), scale_of<T>(scale, one_scale), at<const T>(diagonal), n,
                    directions, at<T>(shift), at<T>(weight), at<T>(factor), at<T>(slope), at<T>(total));
}

template <class T>
void inverse_norms(Address x, std::int64_t rows, std::int64_t dim, std::int64_t stride, T eps, Address out,
                   int threads) {
  kernels<T>().inverse_norms(at<const T>(x), rows, dim, stride, eps, at<T>(out), threads);
}

template <class T>
void through_norms(Address grad, Address unit, Address inverse, std::int64_t rows, std::int64_t dim, T eps,
                   int threads) {
  kernels<T>().through_norms(at<T>(grad), at<const T>(unit), at<const T>(inverse), rows, dim, eps, threads);
}

}  // namespace

void fastloss::bind_contrastive(pybind11::module_& m) {
  m.attr("NO_DIAGONAL") = cpu::kNoDiagonal;
  m.attr("CHUNK") = cpu::kChunk;
  m.def("lse_tile_float", &lse_tile<float>, Unlocked());
  m.def("lse_tile_double", &lse_tile<double>, Unlocked());
  m.def("grad_tile_float", &grad_tile<float>, Unlocked());
  m.def("grad_tile_double", &grad_tile<double>, Unlocked());
  m.def("turn_float", &turn<float>, Unlocked());
  m.def("turn_double", &turn<double>, Unlocked());
  m.def("inverse_norms_float", &inverse_norms<float>, Unlocked());
  m.def("inverse_norms_double", &inverse_norms<double>, Unlocked());
  m.def("through_norms_float", &through_norms<float>, Unlocked());
  m.def("through_norms_double", &through_norms<double>, Unlocked());
}
