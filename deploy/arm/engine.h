// An engine file, loaded: one shared library that holds kernels, constants and the program that calls them.
//
//   __tvm_ffi_<kernel>                               functions
//   edgeprune_constants .. edgeprune_constants_end   aligned bytes
//   edgeprune_program .. edgeprune_program_end       text, see program.h
#pragma once
#include <dlfcn.h>
#include <errno.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <utility>

#include "elf.h"
#include "memory.h"
#include "program.h"
#include "refusal.h"
#include "runnable.h"

namespace edgeprune {

// What the kernel that failed last said, in this thread. Kernels say it through TVMFFIErrorSetRaisedFromCStrParts, so
// each program defines this with what it links: the TVM FFI library, or that function alone (kernel_errors.h).
std::string take_kernel_error();

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Refusal("corrupt", path + ": " + strerror(errno));
  return {std::istreambuf_iterator<char>(file), {}};
}

class Engine : public Runnable {
 public:
  // Loads the file at `path`, called `name` in messages. Throws Refusal.
  Engine(const std::string& path, const std::string& name) : library_(nullptr, &dlclose) {
    check(read_file(path), name);
    library_.reset(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL));
    if (!library_) throw Refusal("compile", name + " cannot be loaded: " + dlerror());
    lend("__TVMBackendAllocWorkspace", reinterpret_cast<void*>(&Scratch::take));
    lend("__TVMBackendFreeWorkspace", reinterpret_cast<void*>(&Scratch::give));
    const auto [constants, constant_bytes] = section("edgeprune_constants", name);
    const auto [text, text_bytes] = section("edgeprune_program", name);
    program_.emplace(std::string_view(reinterpret_cast<const char*>(text), text_bytes), constants, constant_bytes,
                     [this](const std::string& kernel) { return find(kernel); });
  }

  const Program& program() const { return *program_; }
  const std::vector<Port>& inputs() const override { return program_->inputs(); }
  const std::vector<Port>& outputs() const override { return program_->outputs(); }
  const DLTensor& tensor(const Port& port) const override { return program_->tensor(port); }

  // Runs every step once.
  void run() const override {
    for (const Step& step : program_->steps()) run(step);
  }

  void run(const Step& step) const {
    TVMFFIAny result{};
    if (step.function(nullptr, step.arguments.data(), static_cast<int32_t>(step.arguments.size()), &result)) {
      Scratch::reset();
      const std::string said = take_kernel_error();
      throw Refusal("compile", "kernel " + step.kernel + " of layer " + step.layer + " failed" +
                                   (said.empty() ? "" : ": " + said));
    }
  }

 private:
  // Loading runs a library's constructors, so one that is no engine is not even loaded.
  static void check(const std::string& content, const std::string& name) {
    check_library(content, name);
    for (const char* symbol : {"edgeprune_constants", "edgeprune_program"}) {
      if (content.find(std::string(symbol) + "_end") == std::string::npos) {
        throw Refusal("corrupt", name + " is no engine: it has no " + symbol);
      }
    }
  }

  std::pair<const uint8_t*, size_t> section(const std::string& symbol, const std::string& name) const {
    const auto* from = static_cast<const uint8_t*>(dlsym(library_.get(), symbol.c_str()));
    const auto* to = static_cast<const uint8_t*>(dlsym(library_.get(), (symbol + "_end").c_str()));
    if (!from || !to || to < from) throw Refusal("corrupt", name + " is no engine: it has no " + symbol);
    return {from, static_cast<size_t>(to - from)};
  }

  Kernel find(const std::string& kernel) const {
    return reinterpret_cast<Kernel>(dlsym(library_.get(), ("__tvm_ffi_" + kernel).c_str()));
  }

  void lend(const char* pointer, void* function) const {
    if (void* place = dlsym(library_.get(), pointer)) *static_cast<void**>(place) = function;
  }

  std::unique_ptr<void, int (*)(void*)> library_;  // freed last: the program points into it
  std::optional<Program> program_;
};

}  // namespace edgeprune
