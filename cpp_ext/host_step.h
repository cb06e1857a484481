// The integrator step on the CPU: vectorised and threaded. Sizes and types are checked by bindings.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "integrator.h"

namespace elf {

// One pass over slots of the same (length, width).
void run_step(const std::vector<SlotStep>& slots, int64_t length, int64_t width);

// How many threads run_step may use; at least 1.
void set_num_threads(int count);

}  // namespace elf
