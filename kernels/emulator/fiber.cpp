// Fibers: stacks, and the switch between them in assembly.
#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifndef __x86_64__
#error "the CUDA emulator switches stacks in x86-64 assembly: other machines are not supported yet"
#endif

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* saved, const void** bottom, size_t* size);
extern "C" void __asan_unpoison_memory_region(const volatile void* from, size_t bytes);
#endif

// switch_stacks(void** leave, void* enter) pushes what a call must keep, exchanges the stack pointer, and pops. It
// keeps no floating-point control word, because no kernel changes it.
asm(R"(
.text
.p2align 4
.type emulator_switch_stacks, @function
emulator_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    # A return would be predicted to go back to the fiber that is left, and each switch would miss.
    popq %rcx
    jmpq *%rcx
.size emulator_switch_stacks, .-emulator_switch_stacks
)");
extern "C" void emulator_switch_stacks(void** leave, void* enter);

namespace emulator {
namespace {

const size_t page = 4096;
#if defined(__SANITIZE_ADDRESS__)
const size_t stack_bytes = 256 << 10; // the sanitizer adds redzones around every local array
#else
const size_t stack_bytes = 64 << 10;
#endif

// There is one emulator, so all fibers have the same body.
void (*fiber_body)();

// The entry point of a new fiber's first switch.
void enter_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    fiber_body();
    abort();
}

}  // namespace

Fiber* host_fiber() {
    Fiber* fiber = new Fiber();
    pthread_attr_t attributes;
    void* stack = nullptr;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) abort();
    pthread_attr_getstack(&attributes, &stack, &fiber->stack_bytes);
    pthread_attr_destroy(&attributes);
    fiber->stack = static_cast<char*>(stack);
    return fiber;
}

Fiber* new_fiber(unsigned number, void (*body)()) {
    // One mapping per stack, with an inaccessible page below it.
    void* mapping = mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED || mprotect(mapping, page, PROT_NONE) != 0) {
        perror("emulator: no memory for a fiber's stack");
        abort();
    }
    fiber_body = body;
    Fiber* fiber = new Fiber();
    fiber->stack = static_cast<char*>(mapping) + page;
    fiber->stack_bytes = stack_bytes;
    // Stacks that all start at the same offset of a page compete for one set of the cache, so each starts some
    // lines lower than the last.
    const uintptr_t top = reinterpret_cast<uintptr_t>(fiber->stack) + stack_bytes - (number % 16) * 256;
    void** frame = reinterpret_cast<void**>(top) - 1; // the return address; enter_fiber never returns to it
    *--frame = reinterpret_cast<void*>(enter_fiber);
    for (int i = 0; i < 6; ++i) *--frame = nullptr;
    fiber->stack_pointer = frame;
    return fiber;
}

void end_fiber(Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
    // Another stack may come to lie here, and the sanitizer would know it by this one's redzones.
    __asan_unpoison_memory_region(fiber->stack, fiber->stack_bytes);
#endif
    munmap(fiber->stack - page, fiber->stack_bytes + page);
    delete fiber;
}

void switch_fiber(Fiber* from, Fiber* to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from->address_sanitizer, to->stack, to->stack_bytes);
#endif
    emulator_switch_stacks(&from->stack_pointer, to->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from->address_sanitizer, nullptr, nullptr);
#endif
}

}  // namespace emulator
