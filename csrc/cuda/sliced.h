// Sorts rows of projections that are too long for one block. Raw pointers, sizes and a stream only; who calls owns
// every buffer, and has made the tensors' device the current one.
#pragma once

#include <stdint.h>

namespace fastloss {
namespace cuda {

// Bytes of scratch for `slices` rows of n numbers, slices * n < 2^31.
int64_t sort_scratch_bytes(int64_t slices, int64_t n);

// sorted[s] = x[s] in ascending order and order[s] where each came from, both (slices, n): stable, -0 equals 0, NaN
// throughout and the identity for a row with NaN. Enqueued on `stream`, a cudaStream_t; waits for nothing.
void sort_rows(const float* x, int64_t slices, int64_t n, float* sorted, int32_t* order, void* scratch,
               int64_t scratch_bytes, void* stream);

// Version the module was built with, and that of the driver: 1000 major + 10 minor; 0 without a driver.
int runtime_version();
int driver_version();

}  // namespace cuda
}  // namespace fastloss
