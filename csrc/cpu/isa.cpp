#include "isa.h"

#include <stdexcept>
#include <string>

#include "contrastive.h"

namespace fastloss {
namespace cpu {

#define FASTLOSS_DECLARE(isa)                                 \
  namespace isa {                                             \
  extern const ContrastiveKernels<float> contrastive_float;   \
  extern const ContrastiveKernels<double> contrastive_double; \
  }
FASTLOSS_DECLARE(baseline)
#ifdef FASTLOSS_X86
FASTLOSS_DECLARE(avx2)
FASTLOSS_DECLARE(avx512)
#endif

namespace {

struct Isa {
  const char* name;
  bool (*present)();
  const ContrastiveKernels<float>* contrastive_float;
  const ContrastiveKernels<double>* contrastive_double;
};

#define FASTLOSS_ENTRY(isa, present) \
  {#isa, [] { return bool(present); }, &isa::contrastive_float, &isa::contrastive_double}
const Isa kIsas[] = {
// the best first
#ifdef FASTLOSS_X86
    FASTLOSS_ENTRY(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")),
    FASTLOSS_ENTRY(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
#endif
    FASTLOSS_ENTRY(baseline, true)};

const Isa* chosen = nullptr;

}  // namespace

const char* supported_isas() {
  static const std::string names = [] {
    std::string s;
    for (const Isa& isa : kIsas)
      if (isa.present()) s += (s.empty() ? "" : ",") + std::string(isa.name);
    return s;
  }();
  return names.c_str();
}

const char* choose_isa(const char* wanted) {
  const std::string name = wanted;
  for (const Isa& isa : kIsas)
    if ((name.empty() || name == isa.name) && isa.present()) {
      chosen = &isa;
      return isa.name;
    }
  throw std::runtime_error("FASTLOSS_CPU_ISA: expected one of " + std::string(supported_isas()) +
                           " on this processor, got '" + name + "'");
}

const char* chosen_isa() { return chosen->name; }

template <>
const ContrastiveKernels<float>& contrastive_kernels<float>() {
  return *chosen->contrastive_float;
}
template <>
const ContrastiveKernels<double>& contrastive_kernels<double>() {
  return *chosen->contrastive_double;
}

}  // namespace cpu
}  // namespace fastloss
