// pybind11: addresses and sizes in, nothing else. Tensors are unknown here; fastloss/<family>/native.py owns them.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>

#include "cpu/contrastive.h"
#include "cpu/isa.h"

namespace py = pybind11;
using fastloss::cpu::kChunk;
using fastloss::cpu::kNoDiagonal;
using fastloss::cpu::Mask;

namespace {

using Address = std::uintptr_t;  // tensor.data_ptr(); 0 for an argument that is absent

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Mask mask_of(std::int64_t diagonal, Address row_ids, Address col_ids) {
  return {diagonal, at<const std::int64_t>(row_ids), at<const std::int64_t>(col_ids)};
}

template <class T>
void lse_tile(Address c, std::int64_t rows, std::int64_t cols, Address row_scale, Address col_scale,
              std::int64_t diagonal, Address row_ids, Address col_ids, Address row_max, Address row_sum,
              Address col_max, Address col_sum, Address partials, int threads) {
  fastloss::cpu::contrastive_kernels<T>().lse_tile(at<T>(c), rows, cols, at<T>(row_scale), at<T>(col_scale),
                                                   mask_of(diagonal, row_ids, col_ids), at<T>(row_max), at<T>(row_sum),
                                                   at<T>(col_max), at<T>(col_sum), at<T>(partials), threads);
}

template <class T>
void grad_tile(Address c, Address g, std::int64_t rows, std::int64_t cols, Address row_scale, Address row_shift,
               Address row_weight, Address col_scale, Address col_shift, Address col_weight, std::int64_t diagonal,
               Address row_ids, Address col_ids, Address row_dot, Address col_dot, Address partials, int threads) {
  fastloss::cpu::contrastive_kernels<T>().grad_tile(at<T>(c), at<T>(g), rows, cols, at<T>(row_scale), at<T>(row_shift),
                                                    at<T>(row_weight), at<T>(col_scale), at<T>(col_shift),
                                                    at<T>(col_weight), mask_of(diagonal, row_ids, col_ids),
                                                    at<T>(row_dot), at<T>(col_dot), at<T>(partials), threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const char* wanted = std::getenv("FASTLOSS_CPU_ISA");
  fastloss::cpu::choose_isa(wanted ? wanted : "");
  m.def("isa", &fastloss::cpu::chosen_isa);
  m.def("choose_isa", &fastloss::cpu::choose_isa);
  m.def("supported_isas", &fastloss::cpu::supported_isas);
  m.attr("NO_DIAGONAL") = kNoDiagonal;
  m.attr("CHUNK") = kChunk;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("lse_tile_float", &lse_tile<float>, unlocked);
  m.def("lse_tile_double", &lse_tile<double>, unlocked);
  m.def("grad_tile_float", &grad_tile<float>, unlocked);
  m.def("grad_tile_double", &grad_tile<double>, unlocked);
}
