// The extension module fastloss._cuda.
#include "bind.h"
#include "cuda/sliced.h"

using fastloss::Address;
using fastloss::at;

namespace {

void sort_rows(Address x, std::int64_t slices, std::int64_t n, Address sorted, Address order, Address scratch,
               std::int64_t scratch_bytes, Address stream) {
  fastloss::cuda::sort_rows(at<const float>(x), slices, n, at<float>(sorted), at<std::int32_t>(order),
                            at<void>(scratch), scratch_bytes, at<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("architectures") = FASTLOSS_CUDA_ARCHITECTURES;
  m.def("runtime_version", &fastloss::cuda::runtime_version);
  m.def("driver_version", &fastloss::cuda::driver_version);
  m.def("sort_scratch_bytes", &fastloss::cuda::sort_scratch_bytes, fastloss::Unlocked());
  m.def("sort_rows", &sort_rows, fastloss::Unlocked());
}
