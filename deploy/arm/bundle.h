// The bundle that a runner lies in: its manifest, and the digests that every file must have.
#pragma once
#include <dirent.h>
#include <sys/stat.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "engine.h"
#include "json.h"
#include "npy.h"
#include "sha256.h"

namespace edgeprune {

// Why a runner stops, and with which exit code; kind and blame are the words of edgeprune's errors.
struct Stop {
  int code;
  std::string what, next_step, why;
};

constexpr int kWrongAnswer = 1, kWrongRequest = 2, kDamaged = 4, kBug = 70;
inline const char* const kCopyAgain = "copy the bundle again";

class Bundle {
 public:
  explicit Bundle(std::string folder) : folder_(std::move(folder)) {
    const std::string content = read("manifest.json");
    json::Value value;
    if (!json::Reader(content).read(value) || value.kind != json::Value::Kind::kObject) {
      throw Stop{kDamaged, "manifest.json cannot be read", kCopyAgain, ""};
    }
    check_seal(content, value);
    if (text(value, "format") != "edgeprune-bundle" || real(value, "schema_version") != 2) {
      throw Stop{kDamaged, "manifest.json is not of a bundle this runner knows", "", ""};
    }
    manifest_ = std::move(value);
    for (const json::Value& each : member(manifest_, "files").items) files_[text(each, "path")] = &each;
  }

  const std::string& folder() const { return folder_; }
  const json::Value& manifest() const { return manifest_; }
  size_t files() const { return files_.size() + 1; }

  static const json::Value& member(const json::Value& value, const std::string& key) {
    const json::Value* found = value.find(key);
    if (!found) throw Stop{kDamaged, "manifest.json lacks " + key, kCopyAgain, ""};
    return *found;
  }
  static const std::string& text(const json::Value& value, const std::string& key) { return member(value, key).text; }
  static double real(const json::Value& value, const std::string& key) { return member(value, key).real(); }

  bool lists(const std::string& name) const { return files_.count(name) != 0; }

  // The files whose names begin so.
  std::vector<std::string> listed(const std::string& start) const {
    std::vector<std::string> names;
    for (const auto& [name, entry] : files_) {
      if (name.rfind(start, 0) == 0) names.push_back(name);
    }
    return names;
  }

  // The bytes of one file once its digest holds.
  std::string checked(const std::string& name) const {
    const auto entry = files_.find(name);
    if (entry == files_.end()) throw Stop{kDamaged, "manifest.json does not list " + name, kCopyAgain, ""};
    std::string content = read(name);
    if (static_cast<double>(content.size()) != real(*entry->second, "size") ||
        sha256_of(content) != text(*entry->second, "sha256")) {
      throw Stop{kDamaged, name + " was changed: its SHA-256 is not the recorded one", kCopyAgain, ""};
    }
    return content;
  }

  // Every file that is listed is as it was, and nothing else lies beside them.
  void check_all() const {
    std::set<std::string> present;
    walk("", present);
    present.erase("manifest.json");
    for (const auto& [name, entry] : files_) {
      if (!present.erase(name)) throw Stop{kDamaged, "'" + name + "' is missing", kCopyAgain, ""};
      checked(name);
    }
    if (!present.empty()) {
      throw Stop{kDamaged, "'" + *present.begin() + "' does not belong to the bundle", "move it away, or copy the bundle again", ""};
    }
  }

  // A recorded array: side is "input" or "output".
  Array recorded(const std::string& side, size_t place) const {
    const std::string name = "parity/" + side + "_" + std::to_string(place) + ".npy";
    Array array;
    const std::string wrong = read_npy(checked(name), array);
    if (!wrong.empty()) throw Stop{kDamaged, name + ": " + wrong, kCopyAgain, ""};
    return array;
  }

 private:
  // The manifest carries the digest of its own canonical spelling without that digest. It is cut out as text, which is
  // right because it may stand there only once, and the rest must then have that digest to the last byte.
  static void check_seal(const std::string& content, const json::Value& value) {
    const json::Value* claimed = value.find("manifest_sha256");
    const std::string seal = claimed ? "\"manifest_sha256\":" + json::quoted(claimed->text) : "";
    const size_t at = seal.empty() ? std::string::npos : content.find(seal);
    if (at != std::string::npos && content.size() && content.back() == '\n') {
      std::string rest = content.substr(0, content.size() - 1);
      const bool last = rest[at + seal.size()] != ',';
      rest.erase(last && at ? at - 1 : at, seal.size() + 1);
      if (sha256_of(rest) == claimed->text) return;
    }
    throw Stop{kDamaged, "manifest.json was changed: its own digest does not hold", kCopyAgain, ""};
  }

  static bool safe(const std::string& name) {
    static constexpr std::string_view kFirst = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    bool start = true;
    for (const char each : name) {
      const bool plain = kFirst.find(each) != std::string_view::npos;
      if (start ? !plain : !plain && std::string_view("._-/").find(each) == std::string_view::npos) return false;
      start = each == '/';
    }
    return !name.empty() && !start && name.size() <= 200;
  }

  std::string read(const std::string& name) const {
    if (!safe(name)) throw Stop{kDamaged, "a file of the bundle may leave it", "do not trust this copy", ""};
    try {
      return read_file(folder_ + "/" + name);
    } catch (const Refusal& error) {
      throw Stop{kDamaged, name + " cannot be read", kCopyAgain, error.what()};
    }
  }

  void walk(const std::string& above, std::set<std::string>& found) const {
    DIR* listing = opendir((folder_ + "/" + above).c_str());
    if (!listing) throw Stop{kDamaged, above + " cannot be read", kCopyAgain, ""};
    std::vector<std::string> names;
    while (const dirent* each = readdir(listing)) names.emplace_back(each->d_name);
    closedir(listing);
    for (const std::string& name : names) {
      if (name == "." || name == "..") continue;
      struct stat entry {};
      const std::string path = above + name;
      if (lstat((folder_ + "/" + path).c_str(), &entry)) throw Stop{kDamaged, path + " cannot be read", kCopyAgain, ""};
      if (S_ISDIR(entry.st_mode)) {
        walk(path + "/", found);
      } else if (S_ISREG(entry.st_mode)) {
        found.insert(path);
      } else {
        throw Stop{kDamaged, "'" + path + "' is a link or a device", "do not trust this copy", ""};
      }
    }
  }

  std::string folder_;
  json::Value manifest_;
  std::map<std::string, const json::Value*> files_;
};

}  // namespace edgeprune
