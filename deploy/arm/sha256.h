// SHA-256 as FIPS 180-4 defines it, so that a board needs no library to know a file.
#pragma once
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

namespace edgeprune {

class Sha256 {
 public:
  void add(const void* data, size_t count) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    length_ += count;
    while (count) {
      const size_t part = count < sizeof block_ - filled_ ? count : sizeof block_ - filled_;
      memcpy(block_ + filled_, bytes, part);
      filled_ += part;
      bytes += part;
      count -= part;
      if (filled_ == sizeof block_) {
        mix();
        filled_ = 0;
      }
    }
  }

  // 64 hexadecimal digits of everything added; nothing can be added afterwards.
  std::string digest() {
    const uint64_t bits = length_ * 8;
    const uint8_t one = 0x80, zero = 0;
    add(&one, 1);
    while (filled_ != 56) add(&zero, 1);
    uint8_t tail[8];
    for (int place = 0; place < 8; ++place) tail[place] = static_cast<uint8_t>(bits >> (56 - 8 * place));
    add(tail, sizeof tail);
    std::string text;
    char digits[9];
    for (const uint32_t word : state_) {
      snprintf(digits, sizeof digits, "%08x", word);
      text += digits;
    }
    return text;
  }

 private:
  static uint32_t turned(uint32_t word, int by) { return word >> by | word << (32 - by); }

  void mix() {
    static constexpr uint32_t kRound[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t word[64];
    for (int place = 0; place < 16; ++place) {
      const uint8_t* four = block_ + 4 * place;
      word[place] = uint32_t{four[0]} << 24 | uint32_t{four[1]} << 16 | uint32_t{four[2]} << 8 | four[3];
    }
    for (int place = 16; place < 64; ++place) {
      const uint32_t early = word[place - 15], late = word[place - 2];
      word[place] = word[place - 16] + word[place - 7] + (turned(early, 7) ^ turned(early, 18) ^ early >> 3) +
                    (turned(late, 17) ^ turned(late, 19) ^ late >> 10);
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    for (int place = 0; place < 64; ++place) {
      const uint32_t first = h + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & f) ^ (~e & g)) +
                             kRound[place] + word[place];
      const uint32_t second = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
    }
    const std::array<uint32_t, 8> now{a, b, c, d, e, f, g, h};
    for (size_t place = 0; place < state_.size(); ++place) state_[place] += now[place];
  }

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t block_[64] = {};
  size_t filled_ = 0;
  uint64_t length_ = 0;
};

inline std::string sha256_of(const std::string& content) {
  Sha256 sum;
  sum.add(content.data(), content.size());
  return sum.digest();
}

}  // namespace edgeprune
