// CUDA C++ for a host compiler, as far as kernels/*.cu use it.
//
// Honest about: indexing, barriers and warp collectives with their deadlocks, shared memory (poisoned, its own in each block),
// alignment and bounds (under the sanitizers), bf16 rounding, launch limits, and results that depend on an order of threads
// nobody promised. Not about: speed, denormals (kept here, flushed by some instructions there), fast arithmetic's last bits.
#pragma once
#include "bfloat16.h"
#include "language.h"
#include "machine.h"
#include "warp.h"
