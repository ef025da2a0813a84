// What an engine computes: memories, tensors that lie in them, and kernels called in order. All of it is checked when
// it is read, because the text may be damaged or hostile; kernels themselves check the shapes they are given.
//
//   edgeprune-program 1
//   memory <id> <kind> <bytes>                              kind: constants, arena, input, output
//   buffer <id> <memory> <dtype> <offset> <rank> <size>...  a dense tensor, at a multiple of 64 bytes
//   input <buffer> <name>    output <buffer> <name>         names are percent-encoded
//   step <kernel> <layer> <count> <buffer>...               the last buffer is written, the others are read
//   end
#pragma once
#include <dlpack/dlpack.h>

#include <charconv>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "memory.h"
#include "refusal.h"
#include "runnable.h"
#include "tvm/ffi/c_api.h"

namespace edgeprune {

// A kernel as TVM compiles it: (self, arguments, count of arguments, result) -> 0 if it worked.
using Kernel = int (*)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);

// One call of a kernel. `layer` names the node of the graph that it belongs to, as the text has it.
struct Step {
  std::string kernel, layer;
  Kernel function;
  std::vector<TVMFFIAny> arguments;
};

struct Type {
  const char* name;
  DLDataType dtype;
};

inline constexpr Type kTypes[] = {
    {"float32", {kDLFloat, 32, 1}}, {"float16", {kDLFloat, 16, 1}}, {"float64", {kDLFloat, 64, 1}},
    {"int8", {kDLInt, 8, 1}},       {"int32", {kDLInt, 32, 1}},     {"int64", {kDLInt, 64, 1}},
    {"uint8", {kDLUInt, 8, 1}},     {"bool", {kDLBool, 8, 1}},
};

inline const char* type_name(const DLDataType& dtype) {
  for (const Type& each : kTypes) {
    if (each.dtype.code == dtype.code && each.dtype.bits == dtype.bits) return each.name;
  }
  return "unknown";
}

inline size_t bytes_of(const DLTensor& tensor) {
  size_t bytes = tensor.dtype.bits / 8;
  for (int axis = 0; axis < tensor.ndim; ++axis) bytes *= static_cast<size_t>(tensor.shape[axis]);
  return bytes;
}

class Program {
 public:
  // Reads `text`. `constants` are `constant_bytes` bytes that outlive the program; `find` returns a kernel by name, or
  // null. Throws Refusal.
  Program(std::string_view text, const uint8_t* constants, size_t constant_bytes,
          const std::function<Kernel(const std::string&)>& find)
      : text_(text), constants_(constants), constant_bytes_(constant_bytes), find_(find) {
    tensors_.reserve(kMostBuffers);  // steps point into it
    parse();
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  const std::vector<Port>& inputs() const { return inputs_; }
  const std::vector<Port>& outputs() const { return outputs_; }
  const std::vector<Step>& steps() const { return steps_; }
  const DLTensor& tensor(const Port& port) const { return tensors_[port.buffer]; }

  static constexpr size_t kMostBuffers = 1 << 15;
  static constexpr size_t kMostSteps = 1 << 15;
  static constexpr size_t kMostBytes = size_t{1} << 31;  // of all memories together; no board of ours has more to give
  static constexpr size_t kMostAxes = 8;
  static constexpr size_t kLongestWord = 1024;

 private:
  struct Region {
    std::string kind;
    size_t bytes;
    uint8_t* data;
  };

  [[noreturn]] static void refuse(const std::string& why) { throw Refusal("corrupt", "the engine's program: " + why); }

  void parse() {
    if (word() != "edgeprune-program" || number() != 1) refuse("it is not a program of version 1");
    end_line();
    for (std::string verb = word(); verb != "end"; verb = word()) {
      if (verb == "memory") {
        memory();
      } else if (verb == "buffer") {
        buffer();
      } else if (verb == "input" || verb == "output") {
        port(verb == "input" ? inputs_ : outputs_, verb);
      } else if (verb == "step") {
        step();
      } else {
        refuse("it has a line of an unknown kind");
      }
      end_line();
    }
    if (steps_.empty() || outputs_.empty()) refuse("it computes nothing");
  }

  std::string word() {
    const size_t from = place_;
    while (place_ < text_.size() && text_[place_] > ' ' && text_[place_] <= '~') ++place_;
    if (place_ == from || place_ - from > kLongestWord) refuse("it ends too early or a word is missing");
    const std::string read(text_.substr(from, place_ - from));
    if (place_ < text_.size() && text_[place_] == ' ') ++place_;
    return read;
  }

  uint64_t number() {
    const std::string digits = word();
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc() || end != digits.data() + digits.size()) refuse("a number is no number");
    return value;
  }

  size_t number_below(uint64_t limit, const char* what) {
    const uint64_t value = number();
    if (value >= limit) refuse(std::string(what) + " " + std::to_string(value) + " is out of range");
    return static_cast<size_t>(value);
  }

  void end_line() {
    if (place_ >= text_.size() || text_[place_] != '\n') refuse("a line is longer than it should be");
    ++place_;
  }

  void memory() {
    if (number() != regions_.size() || regions_.size() == kMostBuffers) refuse("a memory is out of order");
    const std::string kind = word();
    const size_t bytes = number_below(kMostBytes - total_ + 1, "a memory of size");
    if (kind == "constants") {
      if (bytes != constant_bytes_) refuse("it speaks of other constants than the engine holds");
      regions_.push_back({kind, bytes, const_cast<uint8_t*>(constants_)});  // no step may write there, see step()
      return;
    }
    if (kind != "arena" && kind != "input" && kind != "output") refuse("a memory is of an unknown kind");
    total_ += bytes;
    own_.push_back(zeroed(bytes));
    regions_.push_back({kind, bytes, own_.back().get()});
  }

  void buffer() {
    if (number() != tensors_.size() || tensors_.size() == kMostBuffers) refuse("a buffer is out of order");
    const size_t place = number_below(regions_.size(), "memory");
    const Region& region = regions_[place];
    const std::string dtype = word();
    const size_t offset = number_below(region.bytes + 1, "an offset of");
    if (offset % kAlignment) refuse("a buffer is not aligned");
    auto shape = std::make_unique<std::vector<int64_t>>();
    DLTensor tensor{};
    tensor.dtype = type(dtype);
    size_t bytes = tensor.dtype.bits / 8;
    for (size_t axes = number_below(kMostAxes + 1, "a rank of"); axes; --axes) {
      const size_t size = number_below(kMostBytes + 1, "a size of");
      if (size && bytes > kMostBytes / size) refuse("a buffer is too large");
      bytes *= size;
      shape->push_back(static_cast<int64_t>(size));
    }
    if (bytes > region.bytes - offset) refuse("a buffer lies outside its memory");
    tensor.data = region.data + offset;
    tensor.device = {kDLCPU, 0};
    tensor.ndim = static_cast<int32_t>(shape->size());
    tensor.shape = shape->data();
    shapes_.push_back(std::move(shape));
    tensors_.push_back(tensor);
    region_of_.push_back(place);
  }

  static DLDataType type(const std::string& name) {
    for (const Type& each : kTypes) {
      if (name == each.name) return each.dtype;
    }
    refuse("a buffer is of an unknown type");
  }

  void port(std::vector<Port>& ports, const std::string& kind) {
    const size_t buffer = number_below(tensors_.size(), "buffer");
    if (regions_[region_of_[buffer]].kind != kind) refuse("an " + kind + " does not lie where it should");
    ports.push_back({word(), buffer});
  }

  void step() {
    if (steps_.size() == kMostSteps) refuse("it has too many steps");
    Step next;
    next.kernel = word();
    next.layer = word();
    next.function = find_(next.kernel);
    if (!next.function) refuse("it calls a kernel that the engine does not hold");
    const size_t count = number_below(tensors_.size() + 1, "a count of");
    if (!count) refuse("a step writes nothing");
    size_t last = 0;
    for (size_t place = 0; place < count; ++place) {
      last = number_below(tensors_.size(), "buffer");
      TVMFFIAny argument{};
      argument.type_index = kTVMFFIDLTensorPtr;
      argument.v_ptr = &tensors_[last];
      next.arguments.push_back(argument);
    }
    const std::string& written = regions_[region_of_[last]].kind;
    if (written == "constants" || written == "input") refuse("a step writes what may only be read");
    steps_.push_back(std::move(next));
  }

  std::string_view text_;
  size_t place_ = 0, total_ = 0;
  const uint8_t* constants_;
  size_t constant_bytes_;
  const std::function<Kernel(const std::string&)>& find_;
  std::vector<Memory> own_;
  std::vector<Region> regions_;
  std::vector<std::unique_ptr<std::vector<int64_t>>> shapes_;
  std::vector<DLTensor> tensors_;
  std::vector<size_t> region_of_;
  std::vector<Port> inputs_, outputs_;
  std::vector<Step> steps_;
};

}  // namespace edgeprune
