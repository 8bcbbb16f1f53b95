#if defined(__linux__)
#include <sys/mman.h>
#endif

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
  m.def("advise_huge_pages", &advise_huge_pages, Unlocked());
  m.def("spherical_moments_float", &moments<float>, Unlocked());
  m.def("spherical_moments_double", &moments<double>, Unlocked());
  m.def("spherical_gradient_float", &gradient<float>, Unlocked());
  m.def("spherical_gradient_double", &gradient<double>, Unlocked());
}
