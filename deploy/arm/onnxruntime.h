// An engine of the second kind: an ONNX file, run by ONNX Runtime on one thread, its inputs and outputs bound to fixed
// buffers so that a call is the inference and nothing else.
#pragma once
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "json.h"
#include "memory.h"
#include "onnxruntime_api.h"
#include "program.h"
#include "runnable.h"

namespace edgeprune {

class OnnxEngine : public Runnable {
 public:
  // Loads a model, called `name` in messages. With `profile`, a file name to begin with, every call is profiled.
  // Throws Refusal.
  OnnxEngine(const std::string& content, const std::string& name, const std::string& profile = "") : name_(name) {
    const ort::Api& api = ort::Api::instance();
    api.call(ort::Api::kCreateEnv, ort::kErrorsOnly, "edgeprune", env_.out());
    ort::Owned<ort::SessionOptions, ort::Api::kReleaseSessionOptions> options;
    api.call(ort::Api::kCreateSessionOptions, options.out());
    api.call(ort::Api::kSetSessionExecutionMode, options.get(), ort::kSequential);
    api.call(ort::Api::kSetSessionGraphOptimizationLevel, options.get(), ort::kAllOptimizations);
    api.call(ort::Api::kSetIntraOpNumThreads, options.get(), 1);  // the caller's: there is no pool that could spin
    api.call(ort::Api::kSetInterOpNumThreads, options.get(), 1);
    if (!profile.empty()) api.call(ort::Api::kEnableProfiling, options.get(), profile.c_str());
    api.call(ort::Api::kCreateSessionFromArray, env_.get(), static_cast<const void*>(content.data()), content.size(),
             options.get(), session_.out());
    api.call(ort::Api::kCreateCpuMemoryInfo, ort::kArenaAllocator, ort::kDefaultMemory, memory_.out());
    bind(inputs_, given_, ort::Api::kSessionGetInputCount, ort::Api::kSessionGetInputName,
         ort::Api::kSessionGetInputTypeInfo);
    bind(outputs_, answered_, ort::Api::kSessionGetOutputCount, ort::Api::kSessionGetOutputName,
         ort::Api::kSessionGetOutputTypeInfo);
    if (outputs_.empty()) throw Refusal("compile", name + " computes nothing");
  }
  OnnxEngine(const OnnxEngine&) = delete;
  OnnxEngine& operator=(const OnnxEngine&) = delete;

  const std::vector<Port>& inputs() const override { return inputs_; }
  const std::vector<Port>& outputs() const override { return outputs_; }
  const DLTensor& tensor(const Port& port) const override { return buffers_[port.buffer]->tensor; }

  void run() const override {
    ort::Api::instance().call(ort::Api::kRun, session_.get(), static_cast<const void*>(nullptr), given_.names.data(),
                              given_.values.data(), given_.values.size(), answered_.names.data(),
                              answered_.names.size(), answered_.values.data());
  }

  // Ends profiling and returns what was written; the file is gone then.
  std::string profile() const {
    char* path = nullptr;
    const ort::Api& api = ort::Api::instance();
    api.call(ort::Api::kSessionEndProfiling, session_.get(), allocator(), &path);
    const std::string place = taken(path);
    std::ifstream file(place, std::ios::binary);
    const std::string content{std::istreambuf_iterator<char>(file), {}};
    remove(place.c_str());
    return content;
  }

 private:
  struct Buffer {
    std::string name;
    std::vector<int64_t> shape;
    Memory memory;
    DLTensor tensor{};
    ort::Owned<ort::Value, ort::Api::kReleaseValue> value;
  };

  struct Side {
    std::vector<const char*> names;
    mutable std::vector<ort::Value*> values;
  };

  // How the C API counts the types that engines of ours may have; see ONNXTensorElementDataType.
  struct ElementType {
    int number;
    const char* name;
  };
  static constexpr ElementType kElementTypes[] = {{1, "float32"}, {2, "uint8"}, {3, "int8"},     {6, "int32"},
                                                  {7, "int64"},   {9, "bool"},  {10, "float16"}, {11, "float64"}};

  static ort::Allocator* allocator() {
    ort::Allocator* found = nullptr;
    ort::Api::instance().call(ort::Api::kGetAllocatorWithDefaultOptions, &found);
    return found;
  }

  static std::string taken(char* text) {
    const std::string copy = text;
    ort::Api::instance().call(ort::Api::kAllocatorFree, allocator(), static_cast<void*>(text));
    return copy;
  }

  void bind(std::vector<Port>& ports, Side& side, size_t count_of, size_t name_of, size_t type_of) {
    const ort::Api& api = ort::Api::instance();
    size_t count = 0;
    api.call(count_of, static_cast<const ort::Session*>(session_.get()), &count);
    for (size_t place = 0; place < count; ++place) {
      char* name = nullptr;
      api.call(name_of, static_cast<const ort::Session*>(session_.get()), place, allocator(), &name);
      auto buffer = std::make_unique<Buffer>();
      buffer->name = taken(name);
      shape(*buffer, place, type_of);
      side.names.push_back(buffer->name.c_str());
      side.values.push_back(buffer->value.get());
      ports.push_back({encoded(buffer->name), buffers_.size()});
      buffers_.push_back(std::move(buffer));
    }
  }

  // Gives a buffer the type, the shape and the memory that the graph wants.
  void shape(Buffer& buffer, size_t place, size_t type_of) const {
    const ort::Api& api = ort::Api::instance();
    ort::Owned<ort::TypeInfo, ort::Api::kReleaseTypeInfo> type;
    api.call(type_of, static_cast<const ort::Session*>(session_.get()), place, type.out());
    const ort::TensorInfo* info = nullptr;  // a part of `type`
    api.call(ort::Api::kCastTypeInfoToTensorInfo, static_cast<const ort::TypeInfo*>(type.get()), &info);
    if (!info) throw Refusal("compile", name_ + ": '" + buffer.name + "' is no tensor");
    int number = 0;
    size_t axes = 0;
    api.call(ort::Api::kGetTensorElementType, info, &number);
    api.call(ort::Api::kGetDimensionsCount, info, &axes);
    if (axes > Program::kMostAxes) throw Refusal("compile", name_ + ": '" + buffer.name + "' has too many axes");
    buffer.shape.resize(axes);
    api.call(ort::Api::kGetDimensions, info, buffer.shape.data(), axes);
    fill(buffer, number);
    api.call(ort::Api::kCreateTensorWithDataAsOrtValue, static_cast<const ort::MemoryInfo*>(memory_.get()),
             static_cast<void*>(buffer.memory.get()), bytes_of(buffer.tensor),
             static_cast<const int64_t*>(buffer.shape.data()), axes, number, buffer.value.out());
  }

  void fill(Buffer& buffer, int number) const {
    const Type* known = nullptr;
    for (const ElementType& each : kElementTypes) {
      for (const Type& type : kTypes) {
        if (each.number == number && std::string_view(each.name) == type.name) known = &type;
      }
    }
    if (!known) throw Refusal("compile", name_ + ": '" + buffer.name + "' is of a type that is not known here");
    size_t bytes = known->dtype.bits / 8;
    for (const int64_t size : buffer.shape) {
      if (size < 0) throw Refusal("compile", name_ + ": '" + buffer.name + "' has no fixed shape");
      if (size && bytes > Program::kMostBytes / static_cast<size_t>(size)) {
        throw Refusal("compile", name_ + ": '" + buffer.name + "' is too large");
      }
      bytes *= static_cast<size_t>(size);
    }
    buffer.memory = zeroed(bytes);
    buffer.tensor.data = buffer.memory.get();
    buffer.tensor.device = {kDLCPU, 0};
    buffer.tensor.dtype = known->dtype;
    buffer.tensor.ndim = static_cast<int32_t>(buffer.shape.size());
    buffer.tensor.shape = buffer.shape.data();
  }

  static std::string encoded(const std::string& name) {
    static constexpr std::string_view kPlain =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-~";
    std::string out;
    for (const char each : name) {
      char code[4];
      snprintf(code, sizeof code, "%%%02X", static_cast<uint8_t>(each));
      out += kPlain.find(each) == std::string_view::npos ? std::string(code) : std::string(1, each);
    }
    return out;
  }

  const std::string name_;
  ort::Owned<ort::Env, ort::Api::kReleaseEnv> env_;  // given back last
  ort::Owned<ort::MemoryInfo, ort::Api::kReleaseMemoryInfo> memory_;
  ort::Owned<ort::Session, ort::Api::kReleaseSession> session_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<Port> inputs_, outputs_;
  Side given_, answered_;
};

// What one node of a model costs in one call.
struct Cost {
  std::string node;
  int64_t amount;
};

// The median over its calls, the first left out, of the microseconds that a profile says of each node.
inline std::vector<Cost> costs_of_nodes(const std::string& profile) {
  json::Value events;
  if (!json::Reader(profile).read(events)) throw Refusal("lost", "ONNX Runtime's profile cannot be read");
  static constexpr std::string_view kTail = "_kernel_time";
  std::vector<std::string> order;
  std::map<std::string, std::vector<double>> seen;
  for (const json::Value& each : events.items) {
    const json::Value *kind = each.find("cat"), *name = each.find("name"), *took = each.find("dur");
    if (!kind || !name || !took || kind->text != "Node" || name->text.size() <= kTail.size()) continue;
    const size_t stem = name->text.size() - kTail.size();
    if (name->text.compare(stem, std::string::npos, kTail) != 0) continue;
    const std::string node = name->text.substr(0, stem);
    if (!seen.count(node)) order.push_back(node);
    seen[node].push_back(took->real());
  }
  std::vector<Cost> costs;
  for (const std::string& node : order) {
    std::vector<double>& calls = seen[node];
    if (calls.size() > 1) calls.erase(calls.begin());
    std::nth_element(calls.begin(), calls.begin() + static_cast<long>(calls.size() / 2), calls.end());
    costs.push_back({node, static_cast<int64_t>(calls[calls.size() / 2])});
  }
  return costs;
}

}  // namespace edgeprune
