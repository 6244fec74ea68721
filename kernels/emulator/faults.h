// Turns a kernel's access to foreign memory into a message with kernel, block and thread instead of a bare
// segmentation fault.
#pragma once

namespace emulator {

// While a value of this type lives, faults of threads that run a kernel are reported. Other faults go to the
// previous handler. Only one may live at a time.
class FaultWatch {
  public:
    FaultWatch();
    ~FaultWatch();
};

// Each host thread that runs blocks needs a stack for the signal, because a kernel's own stack may be what
// overflowed.
void prepare_fault_stack();

}  // namespace emulator
