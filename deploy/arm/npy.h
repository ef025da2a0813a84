// Arrays in files, as NumPy writes them: format version 1 to 3, plain numbers in rows, nothing ever unpickled.
// https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace edgeprune {

struct Array {
  std::string dtype;  // NumPy's name: "float32"
  std::vector<int64_t> shape;
  std::string content;
};

struct NumpyType {
  const char *name, *spelled;
  size_t bytes;
};

inline constexpr NumpyType kNumpyTypes[] = {
    {"float32", "<f4", 4}, {"float16", "<f2", 2}, {"float64", "<f8", 8}, {"int8", "|i1", 1},
    {"int32", "<i4", 4},   {"int64", "<i8", 8},   {"uint8", "|u1", 1},   {"bool", "|b1", 1},
};

inline std::string shown(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + (shape.size() == 1 ? ",)" : ")");
}

namespace detail {

// The text after 'key': in the header's Python dictionary, up to the next comma outside brackets; empty if not there.
inline std::string_view entry(std::string_view header, std::string_view key) {
  const size_t at = header.find("'" + std::string(key) + "'");
  if (at == std::string_view::npos) return {};
  size_t from = header.find(':', at);
  if (from == std::string_view::npos) return {};
  from = header.find_first_not_of(' ', from + 1);
  int depth = 0;
  for (size_t to = from; to < header.size(); ++to) {
    if (header[to] == '(') ++depth;
    if (header[to] == ')') --depth;
    if ((header[to] == ',' || header[to] == '}') && depth == 0) return header.substr(from, to - from);
  }
  return {};
}

inline bool sizes(std::string_view text, std::vector<int64_t>& shape) {
  for (size_t place = 0; place < text.size();) {
    const char each = text[place];
    if (each < '0' || each > '9') {
      if (std::string_view("() ,").find(each) == std::string_view::npos) return false;
      ++place;
      continue;
    }
    int64_t size = 0;
    while (place < text.size() && text[place] >= '0' && text[place] <= '9') {
      if (size > (int64_t{1} << 40)) return false;
      size = 10 * size + (text[place++] - '0');
    }
    shape.push_back(size);
  }
  return shape.size() <= 32;
}

}  // namespace detail

// Reads a file's content into `array`; returns what is wrong with it, empty if nothing is.
inline std::string read_npy(std::string_view file, Array& array) {
  static constexpr std::string_view kMagic("\x93NUMPY", 6);
  if (file.size() < 12 || file.substr(0, 6) != kMagic) return "it is not a plain .npy file";
  const bool wide = file[6] > 1;
  size_t length = 0;
  for (int place = wide ? 3 : 1; place >= 0; --place) {
    length = length << 8 | static_cast<uint8_t>(file[8 + static_cast<size_t>(place)]);
  }
  const size_t start = wide ? 12 : 10;
  if (length > file.size() - start) return "it is cut short";
  const std::string_view header = file.substr(start, length), content = file.substr(start + length);
  const std::string_view descr = detail::entry(header, "descr");
  const NumpyType* type = nullptr;
  for (const NumpyType& each : kNumpyTypes) {
    if (descr == "'" + std::string(each.spelled) + "'") type = &each;
  }
  if (!type) return "its numbers are of a type or byte order that this runner does not read";
  if (detail::entry(header, "fortran_order") != "False") return "it lies column by column: numpy.ascontiguousarray(x)";
  if (!detail::sizes(detail::entry(header, "shape"), array.shape)) return "its shape cannot be read";
  size_t bytes = type->bytes;
  for (const int64_t size : array.shape) {
    if (size && bytes > (size_t{1} << 40) / static_cast<size_t>(size)) return "it is too large";
    bytes *= static_cast<size_t>(size);
  }
  if (content.size() != bytes) return "it is cut short, or something lies behind it";
  array.dtype = type->name;
  array.content = std::string(content);
  return "";
}

inline std::string npy(const Array& array) {
  const char* descr = "<f4";
  for (const NumpyType& each : kNumpyTypes) {
    if (array.dtype == each.name) descr = each.spelled;
  }
  std::string header = "{'descr': '" + std::string(descr) + "', 'fortran_order': False, 'shape': " + shown(array.shape) + ", }";
  header.append(63 - (10 + header.size()) % 64, ' ');
  header += '\n';
  std::string file("\x93NUMPY\x01\x00", 8);
  file += static_cast<char>(header.size() & 0xff);
  file += static_cast<char>(header.size() >> 8);
  return file + header + array.content;
}

}  // namespace edgeprune
