#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <string>

#include "bind.h"
#include "cpu/isa.h"
#include "cpu/spherical.h"

using fastloss::Address;
using fastloss::at;

namespace {

template <class T>
void moments(Address x, std::int64_t stride, std::int64_t rows, std::int64_t cols, Address target, Address high,
             Address low, Address square, Address centred, Address logit, Address partials, int threads) {
  fastloss::cpu::chosen_table<fastloss::cpu::SphericalKernels<T>>().moments(
      at<const T>(x), stride, rows, cols, at<const std::int64_t>(target), at<T>(high), at<T>(low), at<T>(square),
      at<T>(centred), at<T>(logit), at<double>(partials), threads);
}

template <class T>
void gradient(Address x, std::int64_t x_stride, Address g, std::int64_t g_stride, std::int64_t rows, std::int64_t cols,
              Address target, Address high, Address low, Address shift, Address scale, Address spike, int threads) {
  fastloss::cpu::chosen_table<fastloss::cpu::SphericalKernels<T>>().gradient(
      at<const T>(x), x_stride, at<T>(g), g_stride, rows, cols, at<const std::int64_t>(target), at<const T>(high),
      at<const T>(low), at<const T>(shift), at<const T>(scale), at<const T>(spike), threads);
}

template <class T>
const fastloss::cpu::SphericalKernels<T>& table() {
  return fastloss::cpu::chosen_table<fastloss::cpu::SphericalKernels<T>>();
}

template <class T>
void factored_statistics(Address rows, Address product, Address hidden, Address mean_row, std::int64_t n,
                         std::int64_t pairs, std::int64_t d, Address t, Address square, Address mean, int threads) {
  table<T>().factored_statistics(at<const T>(rows), at<const T>(product), at<const T>(hidden), at<const T>(mean_row), n,
                                 pairs, d, at<T>(t), at<T>(square), at<T>(mean), threads);
}

template <class T>
void factored_gradient(Address rows, Address product, Address mean_row, Address g_t, Address g_v, Address g_mean,
                       std::int64_t n, std::int64_t pairs, std::int64_t d, Address weighted, Address gradient,
                       int threads) {
  table<T>().factored_gradient(at<const T>(rows), at<const T>(product), at<const T>(mean_row), at<const T>(g_t),
                               at<const T>(g_v), at<const T>(g_mean), n, pairs, d, at<T>(weighted), at<T>(gradient),
                               threads);
}

template <class T>
void factored_factors(Address hidden, Address product, Address weighted, Address g_v, T lr, T shrink, std::int64_t n,
                      std::int64_t d, Address scaled, Address half, Address full, int threads) {
  table<T>().factored_factors(at<const T>(hidden), at<const T>(product), at<const T>(weighted), at<const T>(g_v), lr,
                              shrink, n, d, at<T>(scaled), at<T>(half), at<T>(full), threads);
}

template <class T>
void factored_pairs(Address x, Address target, Address g_t, Address g_v, T lr, T classes, std::int64_t n) {
  table<T>().factored_pairs(at<T>(x), at<const std::int64_t>(target), at<const T>(g_t), at<const T>(g_v), lr, classes,
                            n);
}

template <class T>
bool factored_inverse(Address x, Address g_v, T lr, T shrink, std::int64_t n, Address order) {
  return table<T>().factored_inverse(at<T>(x), at<const T>(g_v), lr, shrink, n, at<std::int64_t>(order));
}

template <class T>
T factored_growth(Address solution, Address hidden, std::int64_t n, std::int64_t d) {
  return table<T>().factored_growth(at<const T>(solution), at<const T>(hidden), n, d);
}

template <class T>
void factored_scatter(Address v, Address target, Address g_t, Address solution, T lr, std::int64_t n,
                      std::int64_t pairs, std::int64_t d, int threads) {
  table<T>().factored_scatter(at<T>(v), at<const std::int64_t>(target), at<const T>(g_t), at<const T>(solution), lr, n,
                              pairs, d, threads);
}

template <class T>
void bind_factored(pybind11::module_& m, const char* dtype) {
  auto named = [&](const char* name) { return "spherical_" + std::string(name) + dtype; };
  m.def(named("factored_statistics_").c_str(), &factored_statistics<T>, fastloss::Unlocked());
  m.def(named("factored_gradient_").c_str(), &factored_gradient<T>, fastloss::Unlocked());
  m.def(named("factored_factors_").c_str(), &factored_factors<T>, fastloss::Unlocked());
  m.def(named("factored_pairs_").c_str(), &factored_pairs<T>, fastloss::Unlocked());
  m.def(named("factored_inverse_").c_str(), &factored_inverse<T>, fastloss::Unlocked());
  m.def(named("factored_growth_").c_str(), &factored_growth<T>, fastloss::Unlocked());
  m.def(named("factored_scatter_").c_str(), &factored_scatter<T>, fastloss::Unlocked());
}

template <class T>
void symmetric_update(Address x, Address change, std::int64_t n, T scale, int threads) {
  table<T>().symmetric_update(at<T>(x), at<const T>(change), n, scale, threads);
}

// Asks for huge pages in fresh memory, whose first touch otherwise costs several times the writing. Advice only: where
// it is not taken, nothing changes.
void advise_huge_pages(Address begin, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr Address kHuge = 2 << 20;
  const Address first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + bytes) / kHuge * kHuge;
  if (first < last) madvise(at<void>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace

void fastloss::bind_spherical(pybind11::module_& m) {
  m.attr("SPHERICAL_CHUNK") = cpu::kSphericalChunk;
  m.def("advise_huge_pages", &advise_huge_pages, fastloss::Unlocked());
  m.def("spherical_moments_float", &moments<float>, fastloss::Unlocked());
  m.def("spherical_moments_double", &moments<double>, fastloss::Unlocked());
  m.def("spherical_gradient_float", &gradient<float>, fastloss::Unlocked());
  m.def("spherical_gradient_double", &gradient<double>, fastloss::Unlocked());
  bind_factored<float>(m, "float");
  bind_factored<double>(m, "double");
  m.def("spherical_symmetric_update_float", &symmetric_update<float>, fastloss::Unlocked());
  m.def("spherical_symmetric_update_double", &symmetric_update<double>, fastloss::Unlocked());
}
