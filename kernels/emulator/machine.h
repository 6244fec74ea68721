// Runs one block of CUDA threads on the host. This is the part of the emulated machine that a kernel's source sees.
//
// Each CUDA thread is a fiber (fiber.h) of the host thread that runs its block. A fiber runs until it waits: at a
// barrier, or at a warp collective (a shuffle, a vote, a matrix product), which the last lane to arrive carries out
// for all. The launch's order decides which thread runs next: forwards, backwards or shuffled. A result that
// depends on an order that the hardware does not promise changes with the order.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "language.h"

namespace emulator {

struct Fiber;

// The place in a kernel's source where a thread waits.
struct Site {
    const char* what;
    const char* file;
    int line;
};

// An operation of a warp. The operands are those of the lanes; null for a lane that takes no part.
typedef void (*Operation)(void* const operands[32]);

// One cp.async of a thread. It is carried out when the thread waits for its group, so that a missing wait shows.
struct Copy {
    void* to;
    const void* from;
    bool inside;
    unsigned group;
};

enum class State : uint8_t { fresh, ready, at_barrier, at_collective, at_phase, at_named, done };

struct Thread {
    uint3 index;
    unsigned linear;
    State state;
    uint32_t mask;         // of the collective it waits at
    Operation operation;
    void* operand;
    const Site* site;
    Fiber* fiber;
    std::vector<Copy> copies;
    unsigned group;        // cp.async groups committed so far
    bool waited;           // for the kernels before its own
    // The race detector's time: the number of barriers passed, and a clock that each __syncwarp sets beyond those
    // of its lanes.
    uint32_t barriers, warp_syncs;
    // The same for orders that barriers with phases and numbers make: the latest access of each thread of the block
    // that is known to be over. Only the race detector keeps it.
    std::vector<uint32_t> known;
    // The state that hopper.cpp keeps: the barrier and parity of at_phase, or the number of at_named.
    unsigned waits_for, parity;
    bool patient;            // gives up rather than wait forever
    bool fenced;             // wgmma_fence was called since products were last waited for
    unsigned product_groups; // committed so far
};

// The content of a tensor map, as cuTensorMapEncodeTiled writes it here.
struct TensorMapBits {
    uint64_t mark, base, row_bytes;
    uint32_t columns, rows, box_columns, box_rows, swizzle;
};
const uint64_t tensor_map_mark = 0x70616d20736e6574;
// A copy of a box to shared memory.
struct Transfer {
    unsigned char* to;
    TensorMapBits map;
    int x, y;
    bool done;
};
// A barrier that counts arrivals and bytes (mbarrier). Its eight bytes of shared memory hold its number.
struct PhaseBarrier {
    const void* at;
    unsigned arrivals, pending, waiters;
    uint64_t phase;
    uint64_t expected_bytes;
    bool made;
    std::vector<Transfer> transfers;
    std::vector<uint32_t> known;
};
struct NamedBarrier {
    unsigned threads, arrived;
    std::vector<uint32_t> known;
};

// Products of a warp that run beside it (wgmma), and the results that they work on.
struct Accumulator {
    float* d[32];
    int count;     // values of a lane
    int running;   // products that will still change it
    std::vector<float> values;
};
struct RunningProduct {
    uint64_t a, b;             // descriptors
    const uint32_t* left[32];  // A in registers; null: in shared memory
    uint32_t left_bits[32][4]; // their values when the product began
    int columns;
    bool accumulate, across_rows, read;
    unsigned group;
    float* result;
    std::vector<float> a_values, b_values;
};
struct Products {
    unsigned issued = 0;
    std::vector<RunningProduct> running;
    std::vector<Accumulator> accumulators;
};

// The lanes of a warp, one bit each: those that wait at a collective, and those that have returned or never were.
struct Warp {
    uint32_t waiting, gone;
};

struct SharedArray {
    const void* key;
    unsigned char* bytes;
    size_t length;
};

// A running block, on one host thread.
struct Block {
    dim3 grid, size;
    uint3 index;
    const char* kernel;
    bool begins_early;       // it may run beside the kernels before it, until it waits for them
    uint32_t launch, serial; // counts over all launches and over all blocks, both from 1
    size_t dynamic_bytes;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<SharedArray> shared;
    // Hopper's: see hopper.cpp.
    int order;
    uint64_t choices;
    bool gave_up; // a thread no longer waited for a phase: no barrier counts any more, and no result means anything
    std::vector<PhaseBarrier> phases;
    NamedBarrier named[16];
    std::vector<Products> products; // of each warp
};

// The running thread and its block. A fiber never changes its host thread.
extern thread_local Thread* thread __attribute__((tls_model("initial-exec")));
extern thread_local Block* block __attribute__((tls_model("initial-exec")));

// Ends the process and names the kernel, block and thread that did what the hardware leaves undefined.
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

void barrier(const Site* site);

// Leaves the running thread in this state until something makes it ready again.
void park(State state, const Site* site);

// Writes the line of a deadlock's report about a thread that waits at a barrier of hopper.cpp.
void describe_wait(const Thread& thread);
void begin_asynchronous(Block& block);
void end_asynchronous(const Block& block);

// Hooks of the race detector, and whether it is built in. A thread that acquires knows the accesses before the release.
extern bool keeps_order;
extern void (*before_asynchronous_read)(const void* address, size_t bytes);
extern void (*after_asynchronous_write)(const void* address, size_t bytes);
extern void (*at_proxy_fence)();
void release_order(std::vector<uint32_t>& known);
void acquire_order(const std::vector<uint32_t>& known);

// The operation of __syncwarp, which only orders memory.
void order_warp(void* const operands[32]);

// Waits for the lanes of `mask`, then `operation` runs once over their operands.
void collective(uint32_t mask, Operation operation, void* operand, const Site* site);

// Orders the earlier kernels before all further accesses of the running thread.
inline void wait_for_earlier_kernels() { thread->waited = true; }
// Ends the process if the running thread uses global memory, or returns, before it has waited.
void check_waited(const char* what);
// Ends the process if memory that a kernel asks for ahead is not the device's. A count of 0 or less asks for nothing.
void check_ahead(const void* from, int64_t bytes);

// The block's array for this declaration: the same bytes for all its threads, all of them 0xff (NaN) when the block
// starts.
void* shared_array(const void* key, size_t bytes);
void* shared_dynamic();
bool is_shared(const void* address, size_t bytes);

// Whether an address is global memory of the device. The driver answers it, for the race detector.
extern bool (*is_global)(uint64_t address);

inline unsigned lane() { return thread->linear & 31; }

}  // namespace emulator

#define threadIdx (emulator::thread->index)
#define blockIdx (emulator::block->index)
#define blockDim (emulator::block->size)
#define gridDim (emulator::block->grid)
#define warpSize 32

// A site is the statement in the source, one for each instance of a template.
#define EMULATOR_SITE(what) ([]() { static const emulator::Site site = {what, __FILE__, __LINE__}; return &site; }())
#define __syncthreads() emulator::barrier(EMULATOR_SITE("__syncthreads"))
#define SHARED_ARRAY(T, name, n)  \
    static const char name##_key = 0; \
    T* const name = static_cast<T*>(emulator::shared_array(&name##_key, sizeof(T) * (n)))
#define SHARED_DYN(T, name) T* const name = static_cast<T*>(emulator::shared_dynamic())
