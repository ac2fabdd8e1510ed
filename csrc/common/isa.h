// Which instruction set the CPU kernels run in: the best one of those built that this processor has, unless told
// otherwise by SEQKERNELS_ISA in the environment or by set_isa.
#pragma once

#include <string>
#include <vector>

namespace seqkernels {

enum class Isa { kPortable, kAvx2, kAvx512 };

const char* isa_name(Isa isa);
std::vector<Isa> usable_isas();  // built, and on this processor; the best one last
Isa current_isa();
Isa set_isa(const std::string& name);  // returns the previous one; throws std::invalid_argument

}  // namespace seqkernels
