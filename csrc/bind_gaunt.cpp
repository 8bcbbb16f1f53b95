#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "bind.h"
#include "cpu/gaunt.h"
#include "cpu/isa.h"

using fastloss::Address;
using fastloss::at;
using Integers = std::vector<std::int64_t>;

namespace {

// Terms as in GauntProgram. What does not fit would read out of bounds, so it is checked here once more.
void check(const Integers& in_degree, const Integers& out_degree, const Integers& terms, std::int64_t degree,
           std::int64_t band) {
  std::size_t next = 0;
  auto take = [&] { return next < terms.size() ? terms[next++] : throw std::invalid_argument("terms end early"); };
  bool fits = in_degree.size() <= 64;
  for (const Integers* degrees : {&in_degree, &out_degree})
    for (std::int64_t d : *degrees) fits = fits && d >= 0 && d <= degree;
  for (std::size_t o = 0; fits && o < out_degree.size(); ++o)
    for (std::int64_t t = take(); fits && t > 0; --t) {
      take();
      std::int64_t sum = 0;
      const std::int64_t factors = take();
      fits = factors > 0;
      for (std::int64_t f = 0; fits && f < factors; ++f) {
        const std::int64_t i = take();
        fits = i >= 0 && i < std::int64_t(in_degree.size());
        if (fits) sum += in_degree[i];
      }
      fits = fits && sum <= band;
    }
  if (!fits || next != terms.size()) throw std::invalid_argument("gaunt: terms do not fit the tensors");
}

template <class T>
struct Call {
  Integers in_degree, out_degree, terms;
  std::int64_t degree, band, pairs;
  bool equator;
  Call(Integers in, Integers out, Integers t, std::int64_t degree, std::int64_t band, std::int64_t pairs, bool equator)
      : in_degree(std::move(in)),
        out_degree(std::move(out)),
        terms(std::move(t)),
        degree(degree),
        band(band),
        pairs(pairs),
        equator(equator) {
    check(in_degree, out_degree, terms, degree, band);
  }

  fastloss::cpu::GauntProgram<T> program() const {
    fastloss::cpu::GauntProgram<T> p{};
    p.inputs = std::int64_t(in_degree.size());
    p.outputs = std::int64_t(out_degree.size());
    p.in_degree = in_degree.data();
    p.out_degree = out_degree.data();
    p.terms = terms.data();
    p.degree = degree;
    p.band = band;
    p.pairs = pairs;
    p.equator = equator;
    return p;
  }

  std::int64_t scratch() const {
    return fastloss::cpu::chosen_table<fastloss::cpu::GauntKernels<T>>().scratch(program());
  }

  void run(const std::vector<Address>& x, const std::vector<Address>& y, std::int64_t lanes, std::int64_t channels,
           Address to_ring, Address from_ring, Address scratch, int threads) const {
    if (x.size() != in_degree.size() || y.size() != out_degree.size())
      throw std::invalid_argument("gaunt: as many addresses as tensors");
    std::vector<const T*> inputs;
    std::vector<T*> outputs;
    for (Address a : x) inputs.push_back(at<const T>(a));
    for (Address a : y) outputs.push_back(at<T>(a));
    auto p = program();
    p.lanes = lanes;
    p.channels = channels;
    p.x = inputs.data();
    p.y = outputs.data();
    p.to_ring = at<const T>(to_ring);
    p.from_ring = at<const T>(from_ring);
    fastloss::cpu::chosen_table<fastloss::cpu::GauntKernels<T>>().run(p, at<T>(scratch), threads);
  }
};

template <class T>
void bind(pybind11::module_& m, const char* name) {
  pybind11::class_<Call<T>>(m, name)
      .def(pybind11::init<Integers, Integers, Integers, std::int64_t, std::int64_t, std::int64_t, bool>())
      .def("scratch", &Call<T>::scratch)
      .def("run", &Call<T>::run, fastloss::Unlocked());
}

}  // namespace

void fastloss::bind_gaunt(pybind11::module_& m) {
  bind<float>(m, "GauntFloat");
  bind<double>(m, "GauntDouble");
}
