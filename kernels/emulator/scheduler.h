// Runs all threads of one block to their end.
#pragma once
#include <vector>

#include "machine.h"

namespace emulator {

// `sequence` is a permutation of the block's threads: the order in which they run.
void run_block(Block& block, const std::vector<unsigned>& sequence, void (*call)(void**), void** arguments);

}  // namespace emulator
