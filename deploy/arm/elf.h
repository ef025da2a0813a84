// Whether a file is a whole shared library for this machine, looked at before the loader maps it: a truncated one would
// end the process with a bus error, and one for another machine deserves a plain sentence.
#pragma once
#include <elf.h>

#include <cstring>
#include <string>

#include "refusal.h"

namespace edgeprune {

inline std::string machine_name(unsigned machine) {
  switch (machine) {
    case EM_AARCH64: return "aarch64";
    case EM_X86_64: return "x86_64";
    case EM_ARM: return "32-bit arm";
    case EM_RISCV: return "riscv";
    default: return "machine " + std::to_string(machine);
  }
}

#if defined(__aarch64__)
inline constexpr unsigned kMachine = EM_AARCH64;
#elif defined(__x86_64__)
inline constexpr unsigned kMachine = EM_X86_64;
#else
#error "engines are made for aarch64 and x86_64"
#endif

namespace detail {

template <typename Header>
Header header_at(const std::string& content, uint64_t offset, const std::string& name) {
  if (offset > content.size() || content.size() - offset < sizeof(Header)) {
    throw Refusal("corrupt", name + " is cut short");
  }
  Header header;
  memcpy(&header, content.data() + offset, sizeof header);
  return header;
}

inline void check_inside(uint64_t offset, uint64_t bytes, const std::string& content, const std::string& name) {
  if (offset > content.size() || bytes > content.size() - offset) throw Refusal("corrupt", name + " is cut short");
}

}  // namespace detail

// Throws Refusal unless `content`, called `name` in messages, is such a library.
inline void check_library(const std::string& content, const std::string& name) {
  if (content.compare(0, SELFMAG, ELFMAG) != 0) throw Refusal("corrupt", name + " is no shared library");
  const auto header = detail::header_at<Elf64_Ehdr>(content, 0, name);
  if (header.e_machine != kMachine || header.e_ident[EI_CLASS] != ELFCLASS64) {
    throw Refusal("architecture", name + " is for " + machine_name(header.e_machine) + ", this machine is " +
                                      machine_name(kMachine));
  }
  if (header.e_type != ET_DYN || header.e_ident[EI_DATA] != ELFDATA2LSB ||
      header.e_phentsize != sizeof(Elf64_Phdr) || header.e_shentsize != sizeof(Elf64_Shdr)) {
    throw Refusal("corrupt", name + " is no shared library");
  }
  for (unsigned place = 0; place < header.e_phnum; ++place) {
    const auto segment = detail::header_at<Elf64_Phdr>(content, header.e_phoff + place * sizeof(Elf64_Phdr), name);
    detail::check_inside(segment.p_offset, segment.p_filesz, content, name);
  }
  detail::check_inside(header.e_shoff, uint64_t{header.e_shnum} * sizeof(Elf64_Shdr), content, name);
}

}  // namespace edgeprune
