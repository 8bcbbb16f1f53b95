#include "isa.h"

#include <stdexcept>
#include <string>

#include "contrastive.h"
#include "gaunt.h"
#include "sliced.h"
#include "spherical.h"

namespace fastloss {
namespace cpu {

// Every table of kernels: its type and its name. A family adds its lines here and its header above.
#define FASTLOSS_TABLES(X)                          \
  X(ContrastiveKernels<float>, contrastive_float)   \
  X(ContrastiveKernels<double>, contrastive_double) \
  X(SphericalKernels<float>, spherical_float)       \
  X(SphericalKernels<double>, spherical_double)     \
  X(SlicedKernels<float>, sliced_float)             \
  X(SlicedKernels<double>, sliced_double)           \
  X(GauntKernels<float>, gaunt_float)               \
  X(GauntKernels<double>, gaunt_double)

#define FASTLOSS_EXTERN(type, name) extern const type name;
#define FASTLOSS_DECLARE(isa)      \
  namespace isa {                  \
  FASTLOSS_TABLES(FASTLOSS_EXTERN) \
  }
FASTLOSS_DECLARE(baseline)
#ifdef FASTLOSS_X86
FASTLOSS_DECLARE(avx2)
FASTLOSS_DECLARE(avx512)
#endif

namespace {

#define FASTLOSS_POINTER(type, name) const type* name;
struct Isa {
  const char* name;
  bool (*present)();
  FASTLOSS_TABLES(FASTLOSS_POINTER)
};

// One set per instruction set: its namespace is opened to name its tables.
#define FASTLOSS_ADDRESS(type, name) entry.name = &name;
#define FASTLOSS_ENTRY(isa, condition)              \
  [] {                                              \
    using namespace isa;                            \
    Isa entry{};                                    \
    entry.name = #isa;                              \
    entry.present = [] { return bool(condition); }; \
    FASTLOSS_TABLES(FASTLOSS_ADDRESS)               \
    return entry;                                   \
  }()
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

#define FASTLOSS_CHOSEN(type, name)  \
  template <>                        \
  const type& chosen_table<type>() { \
    return *chosen->name;            \
  }
FASTLOSS_TABLES(FASTLOSS_CHOSEN)

}  // namespace cpu
}  // namespace fastloss
