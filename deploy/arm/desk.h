// What one session may do with the board: bring engines, run them, time them, and ask for facts.
//
// Every function answers with text or bytes, or throws "edgeprune:<kind>: why"; the kinds are those of refusal.h.
#pragma once
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "counter.h"
#include "counting_clock.h"
#include "engine.h"
#include "facts.h"
#include "json.h"
#include "onnxruntime.h"
#include "priority.h"
#include "refusal.h"
#include "sha256.h"
#include "timing.h"

namespace edgeprune {

inline constexpr int kProtocol = 2;  // of these functions; the host refuses to talk to another

// What the supervisor and a session tell each other, in memory they share.
struct Shared {
  std::atomic<int64_t> deadline_ms;  // on the monotonic clock, when the session is ended
  char holder[128];                  // who holds the board
  char last_end[128];                // how the session before ended
};

inline int64_t now_ms() { return static_cast<int64_t>(now_s() * 1000); }

class Desk {
 public:
  // `folder` is the session's own; `limit_s` is how long a call may take, and how long nothing may be asked.
  Desk(std::string folder, Shared& shared, double limit_s, size_t upload_cap)
      : folder_(std::move(folder)), shared_(shared), limit_s_(limit_s), upload_cap_(upload_cap) {
    extend();
  }

  // Puts the end of the session off, and takes what it throws to the supervisor's words.
  template <typename Work>
  auto serve(const Work& work) {
    extend();
    struct Done {
      Desk* desk;
      ~Done() { desk->extend(); }
    } done{this};
    try {
      return work();
    } catch (const Refusal& error) {
      throw std::runtime_error("edgeprune:" + error.kind() + ": " + error.what());
    } catch (const std::bad_alloc&) {
      throw std::runtime_error("edgeprune:memory: the board has no memory left");
    }
  }

  std::string path(const std::string& name) const {
    static constexpr std::string_view kAllowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    if (name.empty() || name.size() > 100 || name[0] == '.' || name.find_first_not_of(kAllowed) != std::string::npos) {
      throw Refusal("request", "a file name of letters, digits and ._- is wanted");
    }
    return folder_ + "/" + name;
  }

  // Writes a new file; one that was there already may be in use and is left alone.
  void upload(const std::string& name, const char* data, size_t bytes) {
    if (bytes > upload_cap_ - uploaded_) {
      throw Refusal("full", "more than " + std::to_string(upload_cap_ >> 20) + " MiB in one session");
    }
    const int file = open(path(name).c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (file < 0) throw Refusal(kind_of(errno), name + ": " + strerror(errno));
    size_t done = 0;
    while (done < bytes) {
      const ssize_t part = write(file, data + done, bytes - done);
      if (part < 0 && errno == EINTR) continue;
      if (part <= 0) {
        const int error = part ? errno : ENOSPC;
        close(file);
        unlink(path(name).c_str());
        throw Refusal(kind_of(error), name + ": " + strerror(error));
      }
      done += static_cast<size_t>(part);
    }
    close(file);
    uploaded_ += bytes;
  }

  std::string download(const std::string& name) const {
    if (size_of(name) > upload_cap_) throw Refusal("request", name + " is too large");
    return read_file(path(name));
  }

  void remove(const std::string& name) {
    const size_t bytes = size_of(name);
    if (unlink(path(name).c_str())) throw Refusal("request", name + ": " + strerror(errno));
    uploaded_ -= std::min(uploaded_, bytes);
  }

  // Checks that an uploaded engine is whole and works, and returns its ports. Under an emulator a call takes thousands of
  // times as long, so there it is run when it is wanted, and not before.
  std::string load(const std::string& name, const std::string& sha256) const {
    if (sha256_of(read_file(path(name))) != sha256) throw Refusal("corrupt", name + " was damaged on its way");
    const auto engine = opened(name);
    fill_noise(*engine);
    if (!emulated_) engine->run();
    return json::Object()
        .raw("inputs", ports(*engine, engine->inputs()))
        .raw("outputs", ports(*engine, engine->outputs()))
        .text();
  }

  // Runs an engine once: all inputs one after another, all outputs alike.
  std::string run(const std::string& name, std::string_view given) const {
    const auto engine = opened(name);
    size_t wanted = 0;
    for (const Port& each : engine->inputs()) wanted += bytes_of(engine->tensor(each));
    if (given.size() != wanted) {
      throw Refusal("compile", "inputs of " + std::to_string(wanted) + " bytes are wanted, not of " +
                                   std::to_string(given.size()));
    }
    for (const Port& each : engine->inputs()) {
      const DLTensor& tensor = engine->tensor(each);
      const size_t bytes = bytes_of(tensor);
      memcpy(tensor.data, given.data(), bytes);
      given.remove_prefix(bytes);
    }
    engine->run();
    std::string out;
    for (const Port& each : engine->outputs()) {
      const DLTensor& tensor = engine->tensor(each);
      out.append(static_cast<const char*>(tensor.data), bytes_of(tensor));
    }
    return out;
  }

  // Times a candidate against a reference.
  std::string time(const std::string& candidate, const std::string& reference, const Sampling& sampling, int cpu,
                   const std::string& wanted) {
    refuse_clock_of_emulator();
    const std::unique_ptr<Runnable> engines[2] = {opened(candidate), opened(reference)};
    for (const auto& each : engines) fill_noise(*each);
    cpu_ = pin(cpu);
    Priority priority(wanted, usable_.size() < 2);
    return spelled(timed_session(*engines[0], *engines[1], sampling, priority));
  }

  // Counts the instructions of several calls of an engine, under an emulator that counts.
  std::string count(const std::string& name) const {
    if (!counted_) throw Refusal("lost", "this board counts no instructions");
    const auto engine = opened(name);
    fill_noise(*engine);
    return json::Object().add("metric", metric()).raw("counts", column(counted_calls(*engine))).text();
  }

  // What each step of an engine costs, in order: nanoseconds, or instructions under a counter. The steps of an ONNX file
  // are the nodes that ONNX Runtime made of it, and are named.
  std::string steps(const std::string& name, int cpu) {
    if (!counted_) {
      refuse_clock_of_emulator();
      cpu_ = pin(cpu);
    }
    if (is_onnx(name)) return nodes(name);
    const Engine engine(path(name), name);
    fill_noise(engine);
    return json::Object()
        .add("metric", metric())
        .raw("costs", column(step_costs(engine, counted_)))
        .text();
  }

  // What the board is, and the state it is in. Under an emulator the sensors are another machine's and left out.
  std::string facts() const {
    utsname system{};
    uname(&system);
    json::Object found;
    found.add("protocol", kProtocol)
        .add("version", EDGEPRUNE_BOARD_VERSION)
        .add("machine", machine_name(kMachine))
        .add("kernel", std::string(system.release))
        .add("metric", metric())
        .add("emulated", emulated_)
        .add("onnxruntime", ort::Api::found())
        .add("cpus", usable_.size())
        .add("boot_id", small_file("/proc/sys/kernel/random/boot_id", 64))
        .add("folder", folder_)
        .add("last_end", std::string(shared_.last_end));
    if (!emulated_) {
      found.add("model", small_file("/proc/device-tree/model", 128))
          .add("cpu_model", field_of("/proc/cpuinfo", {"model name", "Model", "CPU part"}))
          .add("features", field_of("/proc/cpuinfo", {"Features", "flags"}))
          .add("cpu", cpu_)
          .raw("conditions", conditions(cpu_ < 0 && !usable_.empty() ? usable_.back() : cpu_, folder_));
    }
    return found.text();
  }

 private:
  static bool is_onnx(const std::string& name) {
    static constexpr std::string_view kSuffix = ".onnx";
    return name.size() > kSuffix.size() && name.compare(name.size() - kSuffix.size(), std::string::npos, kSuffix) == 0;
  }

  // An uploaded engine of either kind.
  std::unique_ptr<Runnable> opened(const std::string& name) const {
    if (is_onnx(name)) return std::make_unique<OnnxEngine>(read_file(path(name)), name);
    return std::make_unique<Engine>(path(name), name);
  }

  std::string nodes(const std::string& name) const {
    std::optional<CountingClock> clock;
    const OnnxEngine engine(read_file(path(name)), name, folder_ + "/profile");
    fill_noise(engine);
    if (counted_) clock.emplace();
    const std::vector<Cost> costs = node_costs(engine, counted_);
    return json::Object()
        .add("metric", metric())
        .raw("nodes", json::array(costs, [](const Cost& each) { return json::quoted(each.node); }))
        .raw("costs", json::array(costs, [](const Cost& each) { return std::to_string(each.amount); }))
        .text();
  }

  static std::string kind_of(int error) {
    return error == ENOSPC || error == EDQUOT || error == EFBIG ? "full" : "request";
  }

  void extend() { shared_.deadline_ms = now_ms() + static_cast<int64_t>(limit_s_ * 1000); }

  std::string metric() const { return counted_ ? "emulated_instructions" : emulated_ ? "none" : "latency_ns"; }

  void refuse_clock_of_emulator() const {
    if (emulated_) throw Refusal("lost", "this board is emulated, and the clock of an emulator says nothing");
  }

  size_t size_of(const std::string& name) const {
    struct stat file {};
    if (lstat(path(name).c_str(), &file) || !S_ISREG(file.st_mode)) throw Refusal("request", name + " is not there");
    return static_cast<size_t>(file.st_size);
  }

  static std::string ports(const Runnable& engine, const std::vector<Port>& listed) {
    return json::array(listed, [&engine](const Port& port) {
      const DLTensor& tensor = engine.tensor(port);
      const std::vector<int64_t> shape(tensor.shape, tensor.shape + tensor.ndim);
      return json::Object()
          .add("name", port.name)
          .add("dtype", type_name(tensor.dtype))
          .raw("shape", json::array(shape, [](int64_t size) { return std::to_string(size); }))
          .text();
    });
  }

  static std::string column(const std::vector<int64_t>& numbers) {
    return json::array(numbers, [](int64_t each) { return std::to_string(each); });
  }

  static std::string column(const std::vector<Row>& rows, int64_t Row::* field) {
    return json::array(rows, [field](const Row& row) { return std::to_string(row.*field); });
  }

  static std::string spelled(const Session& session) {
    json::Object out;
    out.add("metric", "latency_ns").add("priority", session.priority);
    for (int which = 0; which < 2; ++which) {
      out.raw(which ? "reference" : "candidate", json::Object()
                                                     .raw("wall_ns", column(session.rows[which], &Row::wall_ns))
                                                     .raw("cpu_ns", column(session.rows[which], &Row::cpu_ns))
                                                     .raw("preempted", column(session.rows[which], &Row::preempted))
                                                     .text());
    }
    out.raw("warm_up", json::array(session.warm, [](const WarmUp& warm) {
              return json::Object().add("calls", warm.calls).add("settled", warm.settled).text();
            }));
    return out.text();
  }

  const std::string folder_;
  Shared& shared_;
  const double limit_s_;
  const size_t upload_cap_;
  size_t uploaded_ = 0;
  const std::vector<int> usable_ = usable_cpus();
  const bool counted_ = counted(), emulated_ = emulated();
  int cpu_ = -1;
};

}  // namespace edgeprune
