// Reports segmentation faults inside kernels with kernel, block and thread.
#include "faults.h"

#include <csignal>
#include <cstdlib>

#include "machine.h"

namespace emulator {

#if defined(__SANITIZE_ADDRESS__)
// The sanitizer reports more.
FaultWatch::FaultWatch() {}
FaultWatch::~FaultWatch() {}
void prepare_fault_stack() {}
#else
namespace {

struct sigaction before;

void on_fault(int number, siginfo_t* fault, void*) {
    sigaction(number, &before, nullptr);
    if (block == nullptr) return; // not a kernel's fault: it happens again, and the previous handler gets it
    die("access to %p, which is no memory of the device (or the thread's stack of 64 KiB is full)", fault->si_addr);
}

}  // namespace

FaultWatch::FaultWatch() {
    struct sigaction watch = {};
    watch.sa_sigaction = on_fault;
    watch.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &watch, &before);
}

FaultWatch::~FaultWatch() { sigaction(SIGSEGV, &before, nullptr); }

void prepare_fault_stack() {
    stack_t stack = {};
    sigaltstack(nullptr, &stack);
    if ((stack.ss_flags & SS_DISABLE) == 0) return;
    const size_t bytes = 64 << 10;
    stack.ss_sp = malloc(bytes); // lives as long as the host thread
    stack.ss_size = bytes;
    stack.ss_flags = 0;
    if (stack.ss_sp != nullptr) sigaltstack(&stack, nullptr);
}
#endif

}  // namespace emulator
