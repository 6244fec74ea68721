// A function in, the same function on a stack of its own out: fibers switched by twelve instructions.
//
// swapcontext saves the signal mask by a system call, 0.3 us a switch; kernels switch millions of times. Stacks are kept for the life of the
// host thread. Each ends in a page that cannot be touched, so that a kernel with too large local arrays stops there.
#pragma once
#include <cstddef>

namespace emulator {

struct Fiber {
    void* stack_pointer;  // where it was left
    char* stack;          // its lowest usable address
    size_t stack_bytes;
    void* address_sanitizer;
};

// The host thread itself, to be switched away from and back to.
Fiber* host_fiber();

// The `number`th fiber of this host thread, which will run `body` when first switched to; `body` never returns.
Fiber* new_fiber(unsigned number, void (*body)());

// Leaves `from`, the running fiber, and continues `to`.
void switch_fiber(Fiber* from, Fiber* to);

}  // namespace emulator
