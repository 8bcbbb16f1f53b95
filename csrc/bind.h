// pybind11: addresses and sizes in, nothing else. Tensors are unknown here; fastloss/<family>/native.py owns them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fastloss {

using Address = std::uintptr_t;  // tensor.data_ptr(); 0 for an argument that is absent

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Kernels run without the interpreter's lock.
using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;

// One a family, in bind_<family>.cpp.
void bind_contrastive(pybind11::module_& m);
void bind_spherical(pybind11::module_& m);
void bind_sliced(pybind11::module_& m);
void bind_gaunt(pybind11::module_& m);

}  // namespace fastloss
