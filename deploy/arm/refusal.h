// Why something is refused, and whose turn it is; the words are those of the host's errors.
#pragma once
#include <stdexcept>
#include <string>

namespace edgeprune {

// kind: "corrupt" (the file is not what it was), "architecture" (it is for another machine), "compile" (the engine does
// not work), "full" (no room on the disk), "memory" (no room in memory), "busy", "request" (the question makes no
// sense), "runtime" (ONNX Runtime is wanted and not there), "lost" (the board cannot do what it is for).
class Refusal : public std::runtime_error {
 public:
  Refusal(std::string kind, const std::string& why) : std::runtime_error(why), kind_(std::move(kind)) {}
  const std::string& kind() const { return kind_; }

 private:
  std::string kind_;
};

}  // namespace edgeprune
