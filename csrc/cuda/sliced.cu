// All rows are sorted together: by number, then, stable, by row. So one radix sort of CUB serves rows of any length and
// any count at the full width of the device, and is compiled for one pair of types.
#include <cub/device/device_radix_sort.cuh>
#include <stdexcept>
#include <string>

#include "sliced.h"

namespace fastloss {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kAlign = 256;
constexpr uint32_t kNan = 0xFFFFFFFFu;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("fastloss._cuda: ") + cudaGetErrorString(error));
}

// Unsigned integers in the order of the numbers: -0 is 0, NaN comes last.
__device__ uint32_t key_of(float x) {
  if (x != x) return kNan;
  const uint32_t bits = x == 0 ? 0u : __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__global__ void encode(const float* x, uint32_t count, uint32_t* key, uint32_t* atom) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  key[i] = key_of(x[i]);
  atom[i] = i;
}

__global__ void rows_of(const uint32_t* atom, uint32_t count, uint32_t n, uint32_t* row) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) row[i] = atom[i] / n;
}

// NaN comes last in its row.
__global__ void decode(const float* x, const uint32_t* atom, uint32_t count, uint32_t n, float* sorted,
                       int32_t* order) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  const uint32_t start = i / n * n;
  const float last = x[atom[start + n - 1]];
  const bool broken = last != last;
  sorted[i] = broken ? last : x[atom[i]];
  order[i] = int32_t(broken ? i - start : atom[i] - start);
}

// Two arrays of which either may hold the numbers: the sort then makes none of its own.
using Pair = cub::DoubleBuffer<uint32_t>;

struct Layout {
  int64_t array;  // bytes of one of the four
  size_t temporary;
  Layout(int64_t slices, int64_t n) : array((4 * slices * n + kAlign - 1) / kAlign * kAlign), temporary(0) {
    Pair none;
    check(cub::DeviceRadixSort::SortPairs(nullptr, temporary, none, none, int(slices * n), 0, 32));
  }
  int64_t bytes() const { return 4 * array + int64_t(temporary); }
};

int bits_of(int64_t largest) {
  int bits = 0;
  for (; largest > 0; largest >>= 1) ++bits;
  return bits;
}

}  // namespace

int64_t sort_scratch_bytes(int64_t slices, int64_t n) { return Layout(slices, n).bytes(); }

void sort_rows(const float* x, int64_t slices, int64_t n, float* sorted, int32_t* order, void* scratch,
               int64_t scratch_bytes, void* stream) {
  const Layout layout(slices, n);
  if (scratch_bytes < layout.bytes()) throw std::invalid_argument("fastloss._cuda: scratch is too small");
  const auto on = static_cast<cudaStream_t>(stream);
  const uint32_t count = uint32_t(slices * n);
  if (count == 0) return;
  const uint32_t blocks = (count + kThreads - 1) / kThreads;
  char* place = static_cast<char*>(scratch);
  uint32_t* array[4];
  for (auto& a : array) {
    a = reinterpret_cast<uint32_t*>(place);
    place += layout.array;
  }
  Pair key(array[0], array[1]), atom(array[2], array[3]);
  size_t temporary = layout.temporary;

  encode<<<blocks, kThreads, 0, on>>>(x, count, key.Current(), atom.Current());
  check(cudaGetLastError());
  check(cub::DeviceRadixSort::SortPairs(place, temporary, key, atom, int(count), 0, 32, on));
  if (slices > 1) {
    rows_of<<<blocks, kThreads, 0, on>>>(atom.Current(), count, uint32_t(n), key.Current());
    check(cudaGetLastError());
    check(cub::DeviceRadixSort::SortPairs(place, temporary, key, atom, int(count), 0, bits_of(slices - 1), on));
  }
  decode<<<blocks, kThreads, 0, on>>>(x, atom.Current(), count, uint32_t(n), sorted, order);
  check(cudaGetLastError());
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version));
  return version;
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version));
  return version;
}

}  // namespace cuda
}  // namespace fastloss
