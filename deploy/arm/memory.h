// Aligned memory, and the scratch memory that compiled kernels ask for.
#pragma once
#include <stdlib.h>
#include <string.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "refusal.h"

namespace edgeprune {

// Generated code loads whole vector registers from aligned addresses; a plain malloc crashes wide ones.
inline constexpr size_t kAlignment = 64;

struct Free {
  void operator()(void* memory) const { free(memory); }
};
using Memory = std::unique_ptr<uint8_t, Free>;

inline Memory zeroed(size_t bytes) {
  const size_t whole = (bytes + kAlignment) / kAlignment * kAlignment;  // never none
  void* memory = aligned_alloc(kAlignment, whole);
  if (!memory) throw Refusal("memory", "no memory for " + std::to_string(bytes) + " bytes");
  memset(memory, 0, whole);  // pages are there before anything is timed
  return Memory(static_cast<uint8_t*>(memory));
}

// Scratch memory of one kernel call, kept from call to call: requests are given back in the reverse order they were
// made in, so the n-th request of every call gets the same block. The two functions have the signatures of TVM's
// TVMBackendAllocWorkspace and TVMBackendFreeWorkspace, which kernels call through pointers that they export.
class Scratch {
 public:
  static void* take(int, int, uint64_t bytes, int, int) noexcept {
    Scratch& own = instance();
    try {
      if (own.depth_ == own.blocks_.size()) own.blocks_.emplace_back();
      Block& block = own.blocks_[own.depth_];
      if (block.bytes < bytes) {
        block.memory = zeroed(bytes);
        block.bytes = bytes;
      }
      ++own.depth_;
      return block.memory.get();
    } catch (const std::exception&) {
      return nullptr;  // the kernel reports it
    }
  }

  static int give(int, int, void*) noexcept {
    Scratch& own = instance();
    if (own.depth_) --own.depth_;
    return 0;
  }

  // A kernel that failed half-way has not given back what it took.
  static void reset() { instance().depth_ = 0; }

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

}  // namespace edgeprune
