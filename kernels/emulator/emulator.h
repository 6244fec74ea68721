// CUDA C++ for a host compiler, as far as kernels/*.cu use it.
//
// It shows faults of indexing, barriers and warp collectives with their deadlocks, shared memory (poisoned,
// separate for each block), alignment and bounds (under the sanitizers), bf16 rounding, launch limits, and results
// that depend on an unspecified order of threads. It does not show speed, denormals (kept here, flushed by some
// instructions on the device), or the last bits of fast arithmetic.
#pragma once
#include "bfloat16.h"
#include "language.h"
#include "machine.h"
#include "warp.h"
