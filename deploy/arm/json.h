// Just enough JSON: objects written as text, and a reader with bounded depth for files that may be damaged.
#pragma once
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace edgeprune::json {

inline std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (const char each : text) {
    const auto code = static_cast<unsigned char>(each);
    if (each == '"' || each == '\\') {
      out += '\\';
      out += each;
    } else if (code < 0x20 || code == 0x7f) {
      char escape[8];
      snprintf(escape, sizeof escape, "\\u%04x", code);
      out += escape;
    } else {
      out += each;
    }
  }
  return out + "\"";
}

inline std::string number(double value) {
  if (!(value > -1e308 && value < 1e308)) return "null";  // JSON has no word for it
  char text[32];
  snprintf(text, sizeof text, "%.17g", value);
  return text;
}

// An object in the making: Object().add("a", 1).add("b", "text").text()
class Object {
 public:
  Object& raw(std::string_view key, std::string_view value) {
    text_ += text_.empty() ? "{" : ",";
    text_ += quoted(key) + ":";
    text_ += value;
    return *this;
  }
  template <typename T>
  Object& add(std::string_view key, const T& value) {
    if constexpr (std::is_same_v<T, bool>) return raw(key, value ? "true" : "false");
    else if constexpr (std::is_integral_v<T>) return raw(key, std::to_string(value));
    else if constexpr (std::is_floating_point_v<T>) return raw(key, number(static_cast<double>(value)));
    else return raw(key, json::quoted(value));
  }
  std::string text() const { return text_.empty() ? "{}" : text_ + "}"; }

 private:
  std::string text_;
};

template <typename Items, typename Spell>
std::string array(const Items& items, const Spell& spell) {
  std::string text = "[";
  for (const auto& each : items) {
    if (text.size() > 1) text += ",";
    text += spell(each);
  }
  return text + "]";
}

// A value that was read. Numbers keep their spelling.
struct Value {
  enum class Kind { kNull, kTrue, kFalse, kNumber, kText, kArray, kObject } kind = Kind::kNull;
  std::string text;
  std::vector<Value> items;
  std::map<std::string, Value> members;

  const Value* find(const std::string& key) const {
    const auto found = members.find(key);
    return found == members.end() ? nullptr : &found->second;
  }
  double real() const { return kind == Kind::kNumber ? strtod(text.c_str(), nullptr) : 0; }
};

// Reads one value; returns false if `source` is not exactly that.
class Reader {
 public:
  explicit Reader(std::string_view source) : source_(source) {}

  bool read(Value& value) {
    const bool whole = any(value, 0);
    space();
    return whole && place_ == source_.size();
  }

 private:
  static constexpr int kDeepest = 64;

  void space() {
    while (place_ < source_.size() && std::string_view(" \t\r\n").find(source_[place_]) != std::string_view::npos) {
      ++place_;
    }
  }

  bool take(char wanted) {
    space();
    if (place_ >= source_.size() || source_[place_] != wanted) return false;
    ++place_;
    return true;
  }

  bool literal(std::string_view word, Value& value, Value::Kind kind) {
    if (source_.substr(place_, word.size()) != word) return false;
    place_ += word.size();
    value.kind = kind;
    return true;
  }

  bool any(Value& value, int depth) {
    space();
    if (depth > kDeepest || place_ >= source_.size()) return false;
    switch (source_[place_]) {
      case '{': return object(value, depth);
      case '[': return list(value, depth);
      case '"':
        value.kind = Value::Kind::kText;
        return text(value.text);
      case 't': return literal("true", value, Value::Kind::kTrue);
      case 'f': return literal("false", value, Value::Kind::kFalse);
      case 'n': return literal("null", value, Value::Kind::kNull);
      default: return digits(value);
    }
  }

  bool digits(Value& value) {
    const size_t from = place_;
    while (place_ < source_.size() && std::string_view("+-.eE0123456789").find(source_[place_]) != std::string_view::npos) {
      ++place_;
    }
    value.kind = Value::Kind::kNumber;
    value.text = std::string(source_.substr(from, place_ - from));
    char* end = nullptr;
    strtod(value.text.c_str(), &end);
    return !value.text.empty() && *end == '\0';
  }

  bool list(Value& value, int depth) {
    value.kind = Value::Kind::kArray;
    if (!take('[')) return false;
    if (take(']')) return true;
    do {
      if (!any(value.items.emplace_back(), depth + 1)) return false;
    } while (take(','));
    return take(']');
  }

  bool object(Value& value, int depth) {
    value.kind = Value::Kind::kObject;
    if (!take('{')) return false;
    if (take('}')) return true;
    do {
      std::string key;
      space();
      if (!text(key) || !take(':') || !any(value.members[key], depth + 1)) return false;
    } while (take(','));
    return take('}');
  }

  bool text(std::string& out) {
    if (place_ >= source_.size() || source_[place_] != '"') return false;
    for (++place_; place_ < source_.size(); ++place_) {
      const char each = source_[place_];
      if (each == '"') {
        ++place_;
        return true;
      }
      if (static_cast<unsigned char>(each) < 0x20) return false;
      if (each != '\\') {
        out += each;
      } else if (!escape(out)) {
        return false;
      }
    }
    return false;
  }

  bool escape(std::string& out) {
    static constexpr std::string_view kNames = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
    if (++place_ >= source_.size()) return false;
    if (source_[place_] == 'u') return code_point(out);
    const size_t which = kNames.find(source_[place_]);
    if (which == std::string_view::npos) return false;
    out += kMeant[which];
    return true;
  }

  bool four(uint32_t& code) {
    if (source_.size() - place_ < 5) return false;
    const char* from = source_.data() + place_ + 1;
    const auto [end, error] = std::from_chars(from, from + 4, code, 16);
    place_ += 4;
    return error == std::errc() && end == from + 4;
  }

  bool code_point(std::string& out) {
    uint32_t code = 0;
    if (!four(code)) return false;
    if (code >= 0xd800 && code < 0xdc00 && source_.substr(place_ + 1, 2) == "\\u") {
      uint32_t low = 0;
      place_ += 2;
      if (!four(low) || low < 0xdc00 || low > 0xdfff) return false;
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    if (code < 0x80) {
      out += static_cast<char>(code);
    } else if (code < 0x800) {
      out += static_cast<char>(0xc0 | code >> 6);
      out += static_cast<char>(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
      out += static_cast<char>(0xe0 | code >> 12);
      out += static_cast<char>(0x80 | (code >> 6 & 0x3f));
      out += static_cast<char>(0x80 | (code & 0x3f));
    } else {
      out += static_cast<char>(0xf0 | code >> 18);
      out += static_cast<char>(0x80 | (code >> 12 & 0x3f));
      out += static_cast<char>(0x80 | (code >> 6 & 0x3f));
      out += static_cast<char>(0x80 | (code & 0x3f));
    }
    return true;
  }

  std::string_view source_;
  size_t place_ = 0;
};

}  // namespace edgeprune::json
