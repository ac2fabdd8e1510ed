#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace seqkernels {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

std::vector<Isa> usable_isas() {
  std::vector<Isa> isas{Isa::kPortable};
#ifdef SEQKERNELS_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    isas.push_back(Isa::kAvx2);
  }
#endif
#ifdef SEQKERNELS_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    isas.push_back(Isa::kAvx512);
  }
#endif
  return isas;
}

bool has_vnni(Isa isa) {
#ifdef SEQKERNELS_HAVE_AVX512_VNNI
  if (isa == Isa::kAvx512) return __builtin_cpu_supports("avx512vnni");
#endif
#ifdef SEQKERNELS_HAVE_AVX2_VNNI
  if (isa == Isa::kAvx2) return __builtin_cpu_supports("avxvnni");
#endif
  static_cast<void>(isa);
  return false;
}

namespace {

Isa usable_isa(const std::string& name, const char* where) {
  std::string known;
  for (const Isa isa : usable_isas()) {
    if (name == isa_name(isa)) return isa;
    known += std::string(known.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument(std::string(where) + " must be one of [" + known +
                              "] (built and supported by this processor), got '" + name + "'");
}

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa = [] {
    const char* wanted = std::getenv("SEQKERNELS_ISA");
    return wanted != nullptr && *wanted != 0 ? usable_isa(wanted, "the environment variable SEQKERNELS_ISA")
                                             : usable_isas().back();
  }();
  return isa;
}

}  // namespace

Isa current_isa() { return selected().load(); }

Isa set_isa(const std::string& name) { return selected().exchange(usable_isa(name, "set_isa: name")); }

}  // namespace seqkernels
