// A compiled network: kernels in a shared library, constants in one file, and a list of calls. Needs no TVM runtime.
//
//   DIR/kernels.so     one function __tvm_ffi_<name> a kernel
//   DIR/constants.bin  every constant, each at a multiple of 64 bytes
//   DIR/program.txt    edgeprune-program 1
//                      constants <bytes>
//                      arena <bytes>
//                      buffer <id> <space> <offset> <rank> <size>...     space: c, a (arena), i (input), o (output)
//                      input <buffer> <name>          output <buffer> <name>
//                      step <kernel> <count> <buffer>...
//                      end
#pragma once
#include <dlfcn.h>
#include <dlpack/dlpack.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

#include <cstdint>
#include <fstream>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace edgeprune {

constexpr size_t kAlignment = 64;

inline size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

struct Free {
  void operator()(void* memory) const { free(memory); }
};
using Memory = std::unique_ptr<uint8_t, Free>;

inline Memory allocate(size_t bytes) {
  void* memory = aligned_alloc(kAlignment, aligned(bytes ? bytes : 1));
  if (!memory) throw std::runtime_error("out of memory: " + std::to_string(bytes) + " bytes");
  memset(memory, 0, aligned(bytes ? bytes : 1));
  return Memory(static_cast<uint8_t*>(memory));
}

// Scratch memory of one kernel call: requests are freed in the reverse order they were made in.
class Scratch {
 public:
  static void* take(int, int, uint64_t bytes, int, int) {
    Scratch& own = instance();
    if (own.depth_ == own.blocks_.size()) own.blocks_.emplace_back();
    Block& block = own.blocks_[own.depth_++];
    if (block.bytes < bytes) {
      block.memory = allocate(bytes);
      block.bytes = bytes;
    }
    return block.memory.get();
  }
  static int give(int, int, void*) {
    --instance().depth_;
    return 0;
  }

 private:
  struct Block {
    Memory memory;
    uint64_t bytes = 0;
  };
  static Scratch& instance() {
    static thread_local Scratch scratch;
    return scratch;
  }
  std::vector<Block> blocks_;
  size_t depth_ = 0;
};

class Program {
 public:
  struct Port {
    std::string name;
    size_t buffer;
  };

  explicit Program(const std::string& folder) : folder_(folder) {
    library_ = dlopen((folder + "/kernels.so").c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library_) throw std::runtime_error(std::string("cannot load the kernels: ") + dlerror());
    lend("__TVMBackendAllocWorkspace", reinterpret_cast<void*>(&Scratch::take));
    lend("__TVMBackendFreeWorkspace", reinterpret_cast<void*>(&Scratch::give));
    parse();
  }
  ~Program() {
    if (library_) dlclose(library_);
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  const std::vector<Port>& inputs() const { return inputs_; }
  const std::vector<Port>& outputs() const { return outputs_; }
  const DLTensor& tensor(const Port& port) const { return tensors_[port.buffer]; }
  size_t bytes(const Port& port) const { return size_of(tensors_[port.buffer]); }

  void run() {
    for (const Step& step : steps_) {
      TVMFFIAny result{};
      if (step.function(nullptr, step.arguments.data(), static_cast<int32_t>(step.arguments.size()), &result)) {
        throw std::runtime_error("kernel " + step.name + " failed");
      }
    }
  }

 private:
  using Function = int (*)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
  struct Step {
    std::string name;
    Function function;
    std::vector<TVMFFIAny> arguments;
  };

  static size_t size_of(const DLTensor& tensor) {
    size_t count = 4;
    for (int axis = 0; axis < tensor.ndim; ++axis) count *= static_cast<size_t>(tensor.shape[axis]);
    return count;
  }

  void lend(const char* symbol, void* function) {
    if (void* place = dlsym(library_, symbol)) *static_cast<void**>(place) = function;
  }

  [[noreturn]] void refuse(const std::string& why) const {
    throw std::runtime_error(folder_ + "/program.txt: " + why);
  }

  void parse() {
    std::ifstream text(folder_ + "/program.txt");
    std::string word;
    int version = 0;
    if (!(text >> word >> version) || word != "edgeprune-program" || version != 1) refuse("not a program of version 1");
    while (text >> word && word != "end") {
      if (word == "constants") {
        constants_ = load(read<size_t>(text));
      } else if (word == "arena") {
        arena_bytes_ = read<size_t>(text);
        arena_ = allocate(arena_bytes_);
      } else if (word == "buffer") {
        buffer(text);
      } else if (word == "input" || word == "output") {
        port(text, word == "input" ? inputs_ : outputs_);
      } else if (word == "step") {
        step(text);
      } else {
        refuse("unknown word " + word);
      }
    }
    if (word != "end") refuse("it ends too early");
  }

  template <typename T>
  T read(std::ifstream& text) {
    T value{};
    if (!(text >> value)) refuse("a number is missing");
    return value;
  }

  Memory load(size_t bytes) {
    Memory memory = allocate(bytes);
    std::ifstream file(folder_ + "/constants.bin", std::ios::binary);
    if (!file.read(reinterpret_cast<char*>(memory.get()), static_cast<std::streamsize>(bytes))) {
      refuse("constants.bin is shorter than " + std::to_string(bytes) + " bytes");
    }
    constant_bytes_ = bytes;
    return memory;
  }

  void buffer(std::ifstream& text) {
    const size_t id = read<size_t>(text);
    const std::string space = read<std::string>(text);
    const size_t offset = read<size_t>(text);
    const size_t rank = read<size_t>(text);
    if (id != tensors_.size() || rank > 8) refuse("buffer " + std::to_string(id) + " is out of order or has too many axes");
    shapes_.push_back(std::make_unique<std::vector<int64_t>>());
    size_t bytes = 4;
    for (size_t axis = 0; axis < rank; ++axis) {
      const int64_t size = read<int64_t>(text);
      if (size < 0 || (size && bytes > std::numeric_limits<size_t>::max() / 2 / static_cast<size_t>(size))) refuse("a size is out of range");
      shapes_.back()->push_back(size);
      bytes *= static_cast<size_t>(size);
    }
    uint8_t* data = nullptr;
    if (space == "c" || space == "a") {
      const size_t whole = space == "c" ? constant_bytes_ : arena_bytes_;
      if (offset > whole || bytes > whole - offset) refuse("buffer " + std::to_string(id) + " lies outside its memory");
      data = (space == "c" ? constants_ : arena_).get() + offset;
    } else if (space == "i" || space == "o") {
      own_.push_back(allocate(bytes));
      data = own_.back().get();
    } else {
      refuse("unknown space " + space);
    }
    DLTensor tensor{};
    tensor.data = data;
    tensor.device = {kDLCPU, 0};
    tensor.ndim = static_cast<int32_t>(rank);
    tensor.dtype = {kDLFloat, 32, 1};
    tensor.shape = shapes_.back()->data();
    tensors_.reserve(kMostBuffers);  // arguments point into it
    if (tensors_.size() == kMostBuffers) refuse("too many buffers");
    tensors_.push_back(tensor);
  }

  void port(std::ifstream& text, std::vector<Port>& ports) {
    const size_t id = read<size_t>(text);
    const std::string name = read<std::string>(text);
    if (id >= tensors_.size()) refuse("port " + name + " names no buffer");
    ports.push_back({name, id});
  }

  void step(std::ifstream& text) {
    Step next;
    next.name = read<std::string>(text);
    next.function = reinterpret_cast<Function>(dlsym(library_, ("__tvm_ffi_" + next.name).c_str()));
    if (!next.function) refuse("kernel " + next.name + " is not in kernels.so");
    const size_t count = read<size_t>(text);
    for (size_t place = 0; place < count; ++place) {
      const size_t id = read<size_t>(text);
      if (id >= tensors_.size()) refuse("step " + next.name + " names no buffer");
      TVMFFIAny argument{};
      argument.type_index = kTVMFFIDLTensorPtr;
      argument.v_ptr = &tensors_[id];
      next.arguments.push_back(argument);
    }
    steps_.push_back(std::move(next));
  }

  static constexpr size_t kMostBuffers = 1 << 16;
  std::string folder_;
  void* library_ = nullptr;
  Memory constants_, arena_;
  size_t constant_bytes_ = 0, arena_bytes_ = 0;
  std::vector<Memory> own_;
  std::vector<std::unique_ptr<std::vector<int64_t>>> shapes_;
  std::vector<DLTensor> tensors_;
  std::vector<Port> inputs_, outputs_;
  std::vector<Step> steps_;
};

}  // namespace edgeprune
