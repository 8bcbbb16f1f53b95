// The extension module fastloss._C.
#include <cstdlib>

#include "bind.h"
#include "cpu/isa.h"

PYBIND11_MODULE(_C, m) {
  const char* wanted = std::getenv("FASTLOSS_CPU_ISA");
  fastloss::cpu::choose_isa(wanted ? wanted : "");
  m.def("isa", &fastloss::cpu::chosen_isa);
  m.def("choose_isa", &fastloss::cpu::choose_isa);
  m.def("supported_isas", &fastloss::cpu::supported_isas);
  fastloss::bind_contrastive(m);
  fastloss::bind_spherical(m);
  fastloss::bind_sliced(m);
  fastloss::bind_gaunt(m);
}
