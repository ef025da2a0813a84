// ONNX Runtime's C API, as far as it is needed here. Its wheels ship the library without the header: the library hands
// out a table of functions that is only ever appended to, so a function is known by its place in it. Names and places
// are those of https://onnxruntime.ai/docs/api/c/struct_ort_api.html; functions that can fail answer with a status,
// null if they did not.
#pragma once
#include <dirent.h>
#include <dlfcn.h>
#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "refusal.h"

namespace edgeprune::ort {

struct Status;
struct Env;
struct Session;
struct SessionOptions;
struct Value;
struct MemoryInfo;
struct TypeInfo;
struct TensorInfo;
struct Allocator;

constexpr uint32_t kApiVersion = 22;  // what is asked for; every later library answers to it as well
constexpr int kErrorsOnly = 3, kArenaAllocator = 1, kDefaultMemory = 0, kAllOptimizations = 99, kSequential = 0;

struct ApiBase {
  const void* const* (*table)(uint32_t version);
  const char* (*version)();
};

// The library, loaded when the first engine wants it and kept from then on.
class Api {
 public:
  static const Api& instance() {
    static const Api api;
    return api;
  }

  // The version that lies in the kit's lib folder, empty if none does. Nothing is loaded for it.
  static std::string found() {
    const std::string name = file_name();
    return name.empty() ? "" : name.substr(kPrefix.size());
  }

  template <typename... Given>
  void call(size_t place, Given... given) const {
    Status* status = reinterpret_cast<Status* (*)(Given...)>(at(place))(given...);
    if (!status) return;
    const std::string said = reinterpret_cast<const char* (*)(const Status*)>(at(kGetErrorMessage))(status);
    release(kReleaseStatus, status);
    throw Refusal(kind_of(said), "ONNX Runtime: " + said.substr(0, said.find('\n')));
  }

  template <typename Thing>
  void release(size_t place, Thing* thing) const noexcept {
    reinterpret_cast<void (*)(Thing*)>(const_cast<void*>(table_[place]))(thing);
  }

  enum : size_t {
    kGetErrorMessage = 2,
    kCreateEnv = 3,
    kCreateSessionFromArray = 8,
    kRun = 9,
    kCreateSessionOptions = 10,
    kSetSessionExecutionMode = 13,
    kEnableProfiling = 14,
    kSetSessionGraphOptimizationLevel = 23,
    kSetIntraOpNumThreads = 24,
    kSetInterOpNumThreads = 25,
    kSessionGetInputCount = 30,
    kSessionGetOutputCount = 31,
    kSessionGetInputTypeInfo = 33,
    kSessionGetOutputTypeInfo = 34,
    kSessionGetInputName = 36,
    kSessionGetOutputName = 37,
    kCreateTensorWithDataAsOrtValue = 49,
    kCastTypeInfoToTensorInfo = 55,
    kGetTensorElementType = 60,
    kGetDimensionsCount = 61,
    kGetDimensions = 62,
    kCreateCpuMemoryInfo = 69,
    kAllocatorFree = 76,
    kGetAllocatorWithDefaultOptions = 78,
    kReleaseEnv = 92,
    kReleaseStatus = 93,
    kReleaseMemoryInfo = 94,
    kReleaseSession = 95,
    kReleaseValue = 96,
    kReleaseTypeInfo = 98,
    kReleaseSessionOptions = 100,
    kSessionEndProfiling = 110,
  };

 private:
  static constexpr std::string_view kPrefix = "libonnxruntime.so.";

  Api() {
    const std::string name = file_name();
    if (name.empty()) {
      throw Refusal("runtime", "ONNX Runtime is not installed beside this program: " + folder() + " lacks " +
                                   std::string(kPrefix) + "*");
    }
    // From 1.29 on the wheels report to their makers unless told not to: a thread of its own, files below the home folder
    // and uploads, on a board that was promised to talk to nobody. See Privacy.md in the wheel.
    setenv("ORT_DISABLE_TELEMETRY", "1", 1);
    void* library = dlopen((folder() + "/" + name).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) throw Refusal("runtime", std::string("ONNX Runtime cannot be loaded: ") + dlerror());
    const auto base = reinterpret_cast<const ApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
    table_ = base ? base()->table(kApiVersion) : nullptr;
    if (!table_) throw Refusal("runtime", name + " is older than this program knows it");
  }

  void* at(size_t place) const { return const_cast<void*>(table_[place]); }

  // ../lib, seen from the folder of this program.
  static std::string folder() {
    char path[PATH_MAX];
    const ssize_t count = readlink("/proc/self/exe", path, sizeof path);
    std::string place(path, count > 0 ? static_cast<size_t>(count) : 0);
    for (int up = 0; up < 2; ++up) place = place.substr(0, std::min(place.rfind('/'), place.size()));
    return place + "/lib";
  }

  static std::string file_name() {
    std::string name;
    DIR* listing = opendir(folder().c_str());
    if (!listing) return name;
    while (const dirent* each = readdir(listing)) {
      const std::string_view one(each->d_name);
      if (one.size() > kPrefix.size() && one.substr(0, kPrefix.size()) == kPrefix && one > name) name = one;
    }
    closedir(listing);
    return name;
  }

  static const char* kind_of(const std::string& said) {
    for (const char* each : {"ailed to allocate", "bad_alloc", "ut of memory", "annot allocate memory"}) {
      if (said.find(each) != std::string::npos) return "memory";
    }
    return "compile";
  }

  const void* const* table_ = nullptr;
};

// A thing of the library's that is given back with it.
template <typename Thing, size_t kRelease>
class Owned {
 public:
  Owned() = default;
  ~Owned() { reset(); }
  Owned(Owned&& other) noexcept : thing_(std::exchange(other.thing_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    reset();
    thing_ = std::exchange(other.thing_, nullptr);
    return *this;
  }

  Thing* get() const { return thing_; }
  Thing** out() { return &thing_; }

 private:
  void reset() noexcept {
    if (thing_) Api::instance().release(kRelease, thing_);
    thing_ = nullptr;
  }

  Thing* thing_ = nullptr;
};

}  // namespace edgeprune::ort
