#include "bind.h"
#include "cpu/isa.h"
#include "cpu/sliced.h"

using fastloss::Address;
using fastloss::at;

namespace {

template <class T>
const fastloss::cpu::SlicedKernels<T>& table() {
  return fastloss::cpu::chosen_table<fastloss::cpu::SlicedKernels<T>>();
}

template <class T>
void transport(Address x, Address y, std::int64_t slices, std::int64_t n, std::int64_t m, Address a, Address b,
               double p, Address factor, bool want_x, bool want_y, Address f, Address g, Address cost, Address scratch,
               int threads) {
  table<T>().transport(at<T>(x), at<T>(y), slices, n, m, at<const double>(a), at<const double>(b), p,
                       at<const double>(factor), want_x, want_y, at<T>(f), at<T>(g), at<double>(cost),
                       at<void>(scratch), threads);
}

template <class T>
void sort(Address x, std::int64_t slices, std::int64_t n, Address sorted, Address order, Address scratch, int threads) {
  table<T>().sort(at<const T>(x), slices, n, at<T>(sorted), at<std::int32_t>(order), at<void>(scratch), threads);
}

template <class T>
std::int64_t scratch_bytes(std::int64_t n, std::int64_t m, int threads) {
  return table<T>().scratch_bytes(n, m, threads);
}

}  // namespace

void fastloss::bind_sliced(pybind11::module_& m) {
  m.def("transport_float", &transport<float>, Unlocked());
  m.def("transport_double", &transport<double>, Unlocked());
  m.def("sort_rows_float", &sort<float>, Unlocked());
  m.def("sort_rows_double", &sort<double>, Unlocked());
  m.def("sliced_scratch_float", &scratch_bytes<float>, Unlocked());
  m.def("sliced_scratch_double", &scratch_bytes<double>, Unlocked());
}
