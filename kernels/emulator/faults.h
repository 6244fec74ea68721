// A kernel that touches memory it does not have in; out: its name, block and thread, instead of a bare segmentation fault.
#pragma once

namespace emulator {

// While one lives, faults of threads that run a kernel are told; other faults go where they went before. One at a time.
class FaultWatch {
  public:
    FaultWatch();
    ~FaultWatch();
};

// Each host thread that runs blocks needs a stack for the signal: a kernel's own may be what overflowed.
void prepare_fault_stack();

}  // namespace emulator
