// The one function of TVM's FFI library that kernels call, for programs that do not link that library.
#pragma once
#include <cstdint>
#include <string>
#include <utility>

#include "engine.h"

namespace edgeprune {

inline std::string& kernel_error() {
  static thread_local std::string said;
  return said;
}

std::string take_kernel_error() { return std::exchange(kernel_error(), ""); }

}  // namespace edgeprune

extern "C" __attribute__((visibility("default"))) void TVMFFIErrorSetRaisedFromCStrParts(const char*,
                                                                                         const char** parts,
                                                                                         int32_t count) {
  std::string& said = edgeprune::kernel_error();
  said.clear();
  for (int32_t place = 0; place < count; ++place) {
    if (parts[place]) said += parts[place];
  }
}
