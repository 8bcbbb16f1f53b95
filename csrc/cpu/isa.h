// Run-time choice of the instruction set, made once, at import.
#pragma once

namespace fastloss {
namespace cpu {

// "avx512", "avx2" or "baseline" (SSE2 on x86-64, NEON on arm64), widest last to be refused.
// Raises std::runtime_error if `wanted` (empty: the best there is) is unknown, not compiled in, or not on this
// processor.
const char* choose_isa(const char* wanted);
const char* chosen_isa();
// Comma-separated names that choose_isa would accept here.
const char* supported_isas();

// The kernels compiled for the chosen instruction set; Table is a family's, ContrastiveKernels<float> for one.
template <class Table>
const Table& chosen_table();

}  // namespace cpu
}  // namespace fastloss
