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

void require(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
}

std::int64_t coefficients(const Integers& degrees) {
  std::int64_t sum = 0;
  for (std::int64_t d : degrees) sum += (d + 1) * (d + 1);
  return sum;
}

// What does not fit would read out of bounds, so it is checked here once more.
template <class T>
struct Call {
  Integers in_degree, out_degree, terms, counts;
  std::vector<fastloss::cpu::GauntEntry<T>> entries;
  std::int64_t degree = 0, band = 0, pairs = 0;
  bool equator = false;

  Call(Integers in, Integers out, Integers t)
      : in_degree(std::move(in)), out_degree(std::move(out)), terms(std::move(t)) {
    require(in_degree.size() <= 64, "gaunt: too many inputs");
    for (const Integers* degrees : {&in_degree, &out_degree})
      for (std::int64_t d : *degrees) require(d >= 0, "gaunt: a negative degree");
  }

  // Terms as in GauntProgram.
  void by_rings(std::int64_t most, std::int64_t widest, std::int64_t ring_pairs, bool has_equator) {
    degree = most, band = widest, pairs = ring_pairs, equator = has_equator;
    for (const Integers* degrees : {&in_degree, &out_degree})
      for (std::int64_t d : *degrees) require(d <= degree, "gaunt: a degree beyond the tables");
    std::size_t next = 0;
    auto take = [&] { return next < terms.size() ? terms[next++] : throw std::invalid_argument("terms end early"); };
    for (std::size_t o = 0; o < out_degree.size(); ++o)
      for (std::int64_t t = take(); t > 0; --t) {
        take();
        std::int64_t sum = 0;
        const std::int64_t factors = take();
        require(factors > 0, "gaunt: a term without factors");
        for (std::int64_t f = 0; f < factors; ++f) {
          const std::int64_t i = take();
          require(i >= 0 && i < std::int64_t(in_degree.size()), "gaunt: a factor that is not there");
          sum += in_degree[i];
        }
        require(sum <= band, "gaunt: a product beyond the band");
      }
    require(next == terms.size(), "gaunt: more terms than outputs");
  }

  // Places: two for each entry.
  void by_entries(Integers entry_counts, const Integers& places, const std::vector<double>& values) {
    counts = std::move(entry_counts);
    std::int64_t sum = 0;
    for (std::int64_t c : counts) require(c >= 0, "gaunt: a negative count"), sum += c;
    require(std::int64_t(counts.size()) == coefficients(out_degree) && sum == std::int64_t(values.size()) &&
                places.size() == 2 * values.size(),
            "gaunt: entries do not fit the outputs");
    for (std::int64_t place : places)
      require(place >= 0 && place <= coefficients(in_degree), "gaunt: an entry of a coefficient that is not there");
    for (std::size_t e = 0; e < values.size(); ++e)
      entries.push_back({std::int32_t(places[2 * e]), std::int32_t(places[2 * e + 1]), T(values[e])});
    entries.push_back({0, 0, T(0)});  // so that no entries at all are still not null
  }

  fastloss::cpu::GauntProgram<T> program() const {
    fastloss::cpu::GauntProgram<T> p{};
    p.inputs = std::int64_t(in_degree.size());
    p.outputs = std::int64_t(out_degree.size());
    p.in_degree = in_degree.data();
    p.out_degree = out_degree.data();
    p.terms = terms.data();
    p.entries = entries.empty() ? nullptr : entries.data();
    p.entry_counts = counts.data();
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
      .def(pybind11::init<Integers, Integers, Integers>())
      .def("by_rings", &Call<T>::by_rings)
      .def("by_entries", &Call<T>::by_entries)
      .def("scratch", &Call<T>::scratch)
      .def("run", &Call<T>::run, fastloss::Unlocked());
}

}  // namespace

void fastloss::bind_gaunt(pybind11::module_& m) {
  bind<float>(m, "GauntFloat");
  bind<double>(m, "GauntDouble");
}
