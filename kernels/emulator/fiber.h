// Runs a function on a stack of its own: fibers that are switched by twelve instructions.
//
// swapcontext saves the signal mask by a system call, 0.3 us per switch, and kernels switch millions of times.
// Stacks are kept as long as the host thread. Each ends in an inaccessible page, so that a kernel whose local
// arrays are too large stops there.
#pragma once
#include <cstddef>

namespace emulator {

struct Fiber {
    void* stack_pointer; // the stack pointer when the fiber was left
    char* stack;          // its lowest usable address
    size_t stack_bytes;
    void* address_sanitizer;
};

// The host thread itself, which can be left and continued like a fiber.
Fiber* host_fiber();

// Fiber `number` of this host thread. It runs `body` from its first switch on; `body` never returns.
Fiber* new_fiber(unsigned number, void (*body)());

// Frees a fiber that does not run, and its stack.
void end_fiber(Fiber* fiber);

// Leaves `from`, the running fiber, and continues `to`.
void switch_fiber(Fiber* from, Fiber* to);

}  // namespace emulator
