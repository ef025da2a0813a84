// What state a board is in: clock, temperature, throttling, memory, disk, as far as its kernel and firmware tell.
#pragma once
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <vector>

#include "json.h"
#include "priority.h"

extern char** environ;

namespace edgeprune {

// The first `most` bytes of a small file of the kernel, without what cannot be printed; empty if it cannot be read.
inline std::string small_file(const std::string& path, size_t most = 256) {
  std::ifstream file(path, std::ios::binary);
  std::string content(most, '\0');
  file.read(content.data(), static_cast<std::streamsize>(most));
  content.resize(static_cast<size_t>(file.gcount()));
  content.erase(std::remove_if(content.begin(), content.end(), [](char each) { return each < ' ' || each > '~'; }),
                content.end());
  return content;
}

// The number in such a file, or "null".
inline std::string number_in(const std::string& path) {
  const std::string text = small_file(path, 32);
  const bool digits = !text.empty() && text.find_first_not_of("-0123456789") == std::string::npos;
  return digits ? std::to_string(strtoll(text.c_str(), nullptr, 10)) : "null";
}

inline std::string field_of(const std::string& path, const std::vector<std::string>& names) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    for (const std::string& name : names) {
      const size_t colon = line.find(':');
      if (line.rfind(name, 0) == 0 && colon != std::string::npos) {
        const size_t from = line.find_first_not_of(" \t", colon + 1);
        return from == std::string::npos ? "" : line.substr(from, 200);
      }
    }
  }
  return "";
}

// The first line that a program prints within a second, empty if there is none. Nothing of its arguments is a setting.
inline std::string answer_of(const char* program, const char* argument) {
  int ends[2];
  if (access(program, X_OK) || pipe2(ends, O_CLOEXEC)) return "";
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  pid_t child = -1;
  char* const words[] = {const_cast<char*>(program), const_cast<char*>(argument), nullptr};
  const int failed = posix_spawn(&child, program, &actions, nullptr, words, environ);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  char said[128] = {};
  pollfd wait{ends[0], POLLIN, 0};
  const bool answered = !failed && poll(&wait, 1, 1000) > 0 && read(ends[0], said, sizeof said - 1) > 0;
  close(ends[0]);
  if (!failed) {
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
  }
  const std::string text(said);
  return answered ? text.substr(0, text.find('\n')) : "";
}

// The throttle bits of a Raspberry Pi's firmware, "0x0" if it never throttled; empty on other boards.
inline std::string raspberry_throttled() {
  for (const char* program : {"/usr/bin/vcgencmd", "/opt/vc/bin/vcgencmd"}) {
    const std::string said = answer_of(program, "get_throttled");
    if (said.rfind("throttled=", 0) == 0) return said.substr(10, 16);
  }
  const std::string bits = small_file("/sys/devices/platform/soc/soc:firmware/get_throttled", 16);
  return bits.empty() ? "" : "0x" + bits;
}

inline std::vector<std::string> entries(const std::string& folder, const std::string& prefix) {
  std::vector<std::string> names;
  if (DIR* listing = opendir(folder.c_str())) {
    while (const dirent* each = readdir(listing)) {
      if (std::string(each->d_name).rfind(prefix, 0) == 0) names.emplace_back(each->d_name);
    }
    closedir(listing);
  }
  std::sort(names.begin(), names.end());
  if (names.size() > 64) names.resize(64);
  return names;
}

inline std::string temperatures() {
  json::Object found;
  const std::string zones = "/sys/class/thermal/";
  for (const std::string& zone : entries(zones, "thermal_zone")) {
    const std::string millidegrees = number_in(zones + zone + "/temp");
    if (millidegrees == "null") continue;
    found.add(zone + " " + small_file(zones + zone + "/type", 32), strtod(millidegrees.c_str(), nullptr) / 1000);
  }
  return found.text();
}

inline std::string mebibytes_free(const std::string& folder) {
  struct statvfs disk {};
  if (statvfs(folder.c_str(), &disk)) return "null";
  return std::to_string(static_cast<uint64_t>(disk.f_bavail) * disk.f_frsize >> 20);
}

// What may change from one measurement to the next, as JSON.
inline std::string conditions(int cpu, const std::string& folder) {
  const std::string policy = "/sys/devices/system/cpu/cpu" + std::to_string(std::max(cpu, 0)) + "/cpufreq/";
  const std::string throttled = raspberry_throttled();
  const std::string available = field_of("/proc/meminfo", {"MemAvailable"});
  const std::string governor = small_file(policy + "scaling_governor", 32);
  json::Object seen;
  seen.raw("governor", governor.empty() ? "null" : json::quoted(governor));
  for (const char* name : {"cur", "min", "max"}) {
    seen.raw(std::string("khz_") + name, number_in(policy + "scaling_" + name + "_freq"));
  }
  seen.raw("temperatures_c", temperatures());
  seen.raw("throttled", throttled.empty() ? "null" : json::quoted(throttled));
  seen.raw("load_1m", json::number(strtod(small_file("/proc/loadavg", 32).c_str(), nullptr)));
  seen.raw("free_memory_mib", available.empty() ? "null" : std::to_string(strtoll(available.c_str(), nullptr, 10) >> 10));
  seen.raw("free_disk_mib", mebibytes_free(folder));
  return seen.text();
}

}  // namespace edgeprune
