// edgeprune-board: lets a host bring engines to this board and time them there, one session at a time.
//
//   edgeprune-board [--port 9190] [--folder DIR] [--upload-mib 512] [--call-limit 600] [--until-stdin-closes]
//
// It speaks TVM RPC, so that TVM's own tools work with it, and adds functions "edgeprune.*" to each session. TVM RPC
// knows neither users nor encryption: whoever reaches the port runs code here. So it listens on loopback only, and is
// reached from elsewhere through an ssh tunnel. EDGEPRUNE_BOARD_KEY in the environment is a word that clients must know.
//
//   supervisor ── fork ──▶ session (loads engines, runs kernels; may crash, hang, or be killed)
//       │ ends it when the client goes away, when it overruns its time, and removes what it uploaded
//       └─ fork ──▶ busy session: tells a second client who holds the board, and ends
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <filesystem>
#include <string>
#include <vector>

#include "desk.h"

namespace edgeprune {

using tvm::ffi::Bytes;
using tvm::ffi::Function;
using tvm::ffi::String;

std::string take_kernel_error() {
  TVMFFIObjectHandle handle = nullptr;
  TVMFFIErrorMoveFromRaised(&handle);
  if (!handle) return "";
  const auto error = tvm::ffi::details::ObjectUnsafe::ObjectRefFromObjectPtr<tvm::ffi::Error>(
      tvm::ffi::details::ObjectUnsafe::ObjectPtrFromOwned<tvm::ffi::Object>(static_cast<TVMFFIObject*>(handle)));
  return error.message();
}

struct Settings {
  int port = 9190;
  std::string folder = "/tmp/edgeprune-board-" + std::to_string(getuid());
  std::string key = "edgeprune";
  size_t upload_mib = 512;
  double call_limit_s = 600;
  bool until_stdin_closes = false;
};

// --- the handshake of TVM RPC: magic number, length and words of the client; an answer of the same form

constexpr int32_t kMagic = 0xff271, kMismatch = kMagic + 2;
constexpr int kHandshakeS = 5;
constexpr size_t kMostBusy = 4;
constexpr double kBusyLimitS = 10;

bool receive(int socket, void* data, size_t count) {
  auto* bytes = static_cast<char*>(data);
  while (count) {
    const ssize_t part = recv(socket, bytes, count, 0);
    if (part < 0 && errno == EINTR) continue;
    if (part <= 0) return false;
    bytes += part;
    count -= static_cast<size_t>(part);
  }
  return true;
}

bool say(int socket, const void* data, size_t count) {
  return send(socket, data, count, MSG_NOSIGNAL) == static_cast<ssize_t>(count);
}

struct Client {
  std::string holder = "a client that gave no name";
  double limit_s = 0;
};

// "client:KEY -timeout=SECONDS -holder=NAME" as words.
bool understood(const std::string& said, const std::string& key, Client& client) {
  std::vector<std::string> words;
  for (size_t from = 0; from < said.size();) {
    const size_t to = std::min(said.find(' ', from), said.size());
    if (to > from) words.push_back(said.substr(from, to - from));
    from = to + 1;
  }
  if (words.empty() || words[0] != "client:" + key) return false;
  for (const std::string& word : words) {
    if (word.rfind("-timeout=", 0) == 0) client.limit_s = strtod(word.c_str() + 9, nullptr);
    if (word.rfind("-holder=", 0) == 0) client.holder = word.substr(8, sizeof(Shared::holder) - 1);
  }
  for (char& each : client.holder) {
    if (each <= ' ' || each > '~') each = '?';
  }
  return true;
}

bool shake_hands(int socket, const std::string& key, Client& client) {
  const timeval patience{kHandshakeS, 0}, forever{0, 0};
  setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  int32_t magic = 0, length = 0;
  char words[512];
  if (!receive(socket, &magic, sizeof magic) || magic != kMagic || !receive(socket, &length, sizeof length) ||
      length < 0 || length >= static_cast<int32_t>(sizeof words) ||
      !receive(socket, words, static_cast<size_t>(length))) {
    return false;
  }
  if (!understood(std::string(words, static_cast<size_t>(length)), key, client)) {
    say(socket, &kMismatch, sizeof kMismatch);
    return false;
  }
  const std::string own = "server:edgeprune";
  const auto own_length = static_cast<int32_t>(own.size());
  setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &forever, sizeof forever);
  return say(socket, &kMagic, sizeof kMagic) && say(socket, &own_length, sizeof own_length) &&
         say(socket, own.data(), own.size());
}

// --- what runs in a session's process

const char* const kFunctions[] = {"edgeprune.facts", "edgeprune.load",           "edgeprune.run",
                                  "edgeprune.time",  "edgeprune.steps",          "tvm.rpc.server.upload",
                                  "tvm.rpc.server.download", "tvm.rpc.server.remove", "tvm.rpc.server.load_module"};

void offer(const char* name, Function function) { Function::SetGlobal(name, function, true); }

std::string_view view(const Bytes& bytes) { return {bytes.data(), bytes.size()}; }

void offer_files(Desk& desk) {
  offer("tvm.rpc.server.workpath", Function::FromTyped([&desk](String name) {
          return desk.serve([&] { return String(desk.path(name)); });
        }));
  offer("tvm.rpc.server.upload", Function::FromTyped([&desk](String name, Bytes content) {
          desk.serve([&] { desk.upload(name, content.data(), content.size()); });
        }));
  offer("tvm.rpc.server.download", Function::FromTyped([&desk](String name) {
          return desk.serve([&] { return Bytes(desk.download(name)); });
        }));
  offer("tvm.rpc.server.remove", Function::FromTyped([&desk](String name) {
          desk.serve([&] { desk.remove(name); });
        }));
  offer("tvm.rpc.server.load_module", Function::FromTyped([&desk](String name) {
          return desk.serve([&] { return tvm::ffi::Module::LoadFromFile(desk.path(name)); });
        }));
}

void offer_engines(Desk& desk) {
  offer("edgeprune.facts", Function::FromTyped([&desk] {
          return desk.serve([&] { return Bytes(desk.facts()); });
        }));
  offer("edgeprune.load", Function::FromTyped([&desk](String name, String sha256) {
          return desk.serve([&] { return Bytes(desk.load(name, sha256)); });
        }));
  offer("edgeprune.run", Function::FromTyped([&desk](String name, Bytes inputs) {
          return desk.serve([&] { return Bytes(desk.run(name, view(inputs))); });
        }));
  offer("edgeprune.time",
        Function::FromTyped([&desk](String candidate, String reference, double session_ms, double block_ms,
                                    int64_t dropped_calls, String seed, int64_t cpu, String priority) {
          return desk.serve([&] {
            const int dropped = static_cast<int>(std::clamp<int64_t>(dropped_calls, 0, 100));
            const Sampling sampling{std::clamp(session_ms, 0.0, 60'000.0), block_ms, dropped, seed};
            return Bytes(desk.time(candidate, reference, sampling, static_cast<int>(cpu), priority));
          });
        }));
  offer("edgeprune.steps", Function::FromTyped([&desk](String name, int64_t cpu) {
          return desk.serve([&] { return Bytes(desk.steps(name, static_cast<int>(cpu))); });
        }));
}

void offer_refusal(const std::string& why) {
  for (const char* name : kFunctions) {
    offer(name, Function::FromPacked([why](tvm::ffi::PackedArgs, tvm::ffi::Any*) {
            throw std::runtime_error("edgeprune:busy: " + why);
          }));
  }
}

// Ends with the supervisor, even if that is killed; a stopped supervisor is no dead one.
void die_with(pid_t supervisor) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != supervisor) _exit(0);
}

void loop(int socket) {
  try {
    Function::GetGlobalRequired("rpc.ServerLoop")(socket);
  } catch (const std::exception& error) {
    fprintf(stderr, "edgeprune-board: a session ended early: %.300s\n", error.what());
  }
}

[[noreturn]] void serve(int socket, const Settings& settings, const std::string& folder, Shared& shared) {
  Client client;
  if (!shake_hands(socket, settings.key, client)) _exit(0);
  snprintf(shared.holder, sizeof shared.holder, "%s", client.holder.c_str());
  const double limit_s = client.limit_s > 0 ? std::min(client.limit_s, settings.call_limit_s) : settings.call_limit_s;
  Desk desk(folder, shared, limit_s, settings.upload_mib << 20);
  offer_files(desk);
  offer_engines(desk);
  loop(socket);
  _exit(0);
}

[[noreturn]] void serve_busy(int socket, const Settings& settings, const std::string& why) {
  Client client;
  if (!shake_hands(socket, settings.key, client)) _exit(0);
  offer_refusal(why);
  loop(socket);
  _exit(0);
}

// --- the supervisor

std::string ending(int status) {
  if (WIFSIGNALED(status)) return std::string("it was ended by signal ") + strsignal(WTERMSIG(status));
  return WEXITSTATUS(status) ? "it ended with exit code " + std::to_string(WEXITSTATUS(status)) : "";
}

class Supervisor {
 public:
  Supervisor(Settings settings, int listener) : settings_(std::move(settings)), listener_(listener) {
    void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw Refusal("memory", "no memory to share with sessions");
    shared_ = new (memory) Shared{};
  }

  void run() {
    while (true) {
      pollfd waits[3] = {{listener_, POLLIN, 0},
                         {settings_.until_stdin_closes ? 0 : -1, POLLIN, 0},
                         {session_.socket, POLLRDHUP, 0}};
      poll(waits, 3, kGlanceMs);
      if (waits[1].revents && stdin_closed()) break;
      if (waits[2].revents & (POLLRDHUP | POLLHUP | POLLERR)) hung_up();
      if (session_.pid && now_ms() > shared_->deadline_ms) end("it overran its time and was ended");
      reap();
      if (waits[0].revents & POLLIN) welcome();
    }
    if (session_.pid) end("the board was shut down");
    for (const Child& each : busy_) kill(each.pid, SIGKILL);
  }

 private:
  static constexpr int kGlanceMs = 200;
  static constexpr int64_t kGraceMs = 1000;

  struct Child {
    pid_t pid = 0;
    int socket = -1;
    int64_t since_ms = 0, gone_ms = 0;
    std::string folder;
  };

  static bool stdin_closed() {
    char ignored[256];
    return read(0, ignored, sizeof ignored) <= 0;
  }

  // The client is gone: the session ends by itself unless a kernel still runs.
  void hung_up() {
    if (!session_.gone_ms) session_.gone_ms = now_ms();
    if (now_ms() - session_.gone_ms > kGraceMs) end("");
    if (session_.pid) poll(nullptr, 0, 10);  // the hang-up stays visible: do not spin
  }

  void end(const std::string& why) {
    kill(session_.pid, SIGKILL);
    waitpid(session_.pid, nullptr, 0);
    forget(why);
  }

  void forget(const std::string& why) {
    snprintf(shared_->last_end, sizeof shared_->last_end, "%s", why.c_str());
    if (!why.empty()) fprintf(stderr, "edgeprune-board: the session of %s: %s\n", shared_->holder, why.c_str());
    close(session_.socket);
    std::error_code ignored;
    std::filesystem::remove_all(session_.folder, ignored);
    session_ = {};
  }

  void reap() {
    int status = 0;
    if (session_.pid && waitpid(session_.pid, &status, WNOHANG) == session_.pid) forget(ending(status));
    for (size_t place = busy_.size(); place-- > 0;) {
      if (now_ms() - busy_[place].since_ms > static_cast<int64_t>(kBusyLimitS * 1000)) kill(busy_[place].pid, SIGKILL);
      if (waitpid(busy_[place].pid, nullptr, WNOHANG) == busy_[place].pid) busy_.erase(busy_.begin() + static_cast<long>(place));
    }
  }

  void welcome() {
    const int socket = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    if (socket < 0) return;
    const int on = 1;
    setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(socket, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    if (session_.pid) {
      refuse(socket);
    } else {
      start(socket);
    }
  }

  void refuse(int socket) {
    const int64_t held_s = (now_ms() - session_.since_ms) / 1000;
    const std::string why = std::string("held by ") + shared_->holder + " for " + std::to_string(held_s) + " s";
    const pid_t supervisor = getpid();
    const pid_t pid = busy_.size() < kMostBusy ? fork() : -1;
    if (pid == 0) {
      die_with(supervisor);
      close(listener_);
      serve_busy(socket, settings_, why);
    }
    close(socket);
    if (pid > 0) busy_.push_back({pid, -1, now_ms(), 0, ""});
  }

  void start(int socket) {
    std::string folder = settings_.folder + "/session-XXXXXX";
    if (!mkdtemp(folder.data())) {
      fprintf(stderr, "edgeprune-board: no folder for a session: %s\n", strerror(errno));
      close(socket);
      return;
    }
    snprintf(shared_->holder, sizeof shared_->holder, "a client that has not said its name");
    shared_->deadline_ms = now_ms() + static_cast<int64_t>(settings_.call_limit_s * 1000);
    const pid_t supervisor = getpid();
    const pid_t pid = fork();
    if (pid == 0) {
      die_with(supervisor);
      close(listener_);
      serve(socket, settings_, folder, *shared_);
    }
    session_ = {pid, socket, now_ms(), 0, folder};
    if (pid < 0) forget(std::string("no process: ") + strerror(errno));
  }

  Settings settings_;
  int listener_;
  Shared* shared_ = nullptr;
  Child session_;
  std::vector<Child> busy_;
};

// --- starting

int listen_on_loopback(int port) {
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int on = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  sockaddr_in place{};
  place.sin_family = AF_INET;
  place.sin_port = htons(static_cast<uint16_t>(port));
  place.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof place;
  if (bind(listener, reinterpret_cast<sockaddr*>(&place), sizeof place) || listen(listener, 8) ||
      getsockname(listener, reinterpret_cast<sockaddr*>(&place), &size)) {
    throw Refusal("request", "port " + std::to_string(port) + ": " + strerror(errno));
  }
  printf("edgeprune-board %s listens on 127.0.0.1:%d\n", EDGEPRUNE_BOARD_VERSION, ntohs(place.sin_port));
  fflush(stdout);
  return listener;
}

// Makes the folder this server's own, and empties it of what sessions of a killed server left behind.
void claim(const std::string& folder) {
  if (mkdir(folder.c_str(), 0700) && errno != EEXIST) throw Refusal("request", folder + ": " + strerror(errno));
  struct stat found {};
  if (lstat(folder.c_str(), &found) || !S_ISDIR(found.st_mode) || found.st_uid != getuid()) {
    throw Refusal("request", folder + " is not a folder of this user");
  }
  chmod(folder.c_str(), 0700);
  const int lock = open((folder + "/lock").c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (lock < 0 || flock(lock, LOCK_EX | LOCK_NB)) throw Refusal("request", folder + " is used by another server");
  for (const std::string& left : entries(folder, "session-")) {
    std::error_code ignored;
    std::filesystem::remove_all(folder + "/" + left, ignored);
  }
}

double positive(const std::string& name, const char* text) {
  char* end = nullptr;
  const double value = text ? strtod(text, &end) : 0;
  if (!text || *end || !(value > 0) || value > 1e6) throw Refusal("request", name + " wants a number above 0");
  return value;
}

Settings read_settings(int count, char** words) {
  Settings settings;
  if (const char* key = getenv("EDGEPRUNE_BOARD_KEY")) settings.key = key;
  for (int place = 1; place < count; ++place) {
    const std::string name = words[place];
    const char* value = place + 1 < count ? words[place + 1] : nullptr;
    if (name == "--until-stdin-closes") {
      settings.until_stdin_closes = true;
      continue;
    }
    if (name == "--port") {
      settings.port = value && std::string(value) == "0" ? 0 : static_cast<int>(positive(name, value));
    } else if (name == "--folder" && value) {
      settings.folder = value;
    } else if (name == "--upload-mib") {
      settings.upload_mib = static_cast<size_t>(positive(name, value));
    } else if (name == "--call-limit") {
      settings.call_limit_s = positive(name, value);
    } else {
      throw Refusal("request", "unknown option " + name);
    }
    ++place;
  }
  if (settings.port > 65535) throw Refusal("request", "a port is at most 65535");
  return settings;
}

}  // namespace edgeprune

int main(int count, char** words) {
  try {
    const edgeprune::Settings settings = edgeprune::read_settings(count, words);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);  // a file that may not grow is an error of that write
    edgeprune::claim(settings.folder);
    edgeprune::Supervisor(settings, edgeprune::listen_on_loopback(settings.port)).run();
    return 0;
  } catch (const std::exception& error) {
    fprintf(stderr, "edgeprune-board: %s\n", error.what());
    return 2;
  }
}
