// What a board can run, whichever runtime is behind it: inputs and outputs that lie at fixed addresses, and a call.
#pragma once
#include <dlpack/dlpack.h>

#include <cstdint>
#include <string>
#include <vector>

namespace edgeprune {

// One input or output of the network. Names are percent-encoded, so that they are one word.
struct Port {
  std::string name;
  size_t buffer;
};

class Runnable {
 public:
  virtual ~Runnable() = default;
  virtual const std::vector<Port>& inputs() const = 0;
  virtual const std::vector<Port>& outputs() const = 0;
  virtual const DLTensor& tensor(const Port& port) const = 0;

  // Computes the outputs from the inputs once. Throws Refusal.
  virtual void run() const = 0;
};

}  // namespace edgeprune
