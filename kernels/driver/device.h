// The device of this process: the properties that it reports, its memory, and counts of the requests to it.
//
// Everything is done at once, on the calling thread, under one lock; only copies of pinned memory and collectives
// (nccl.cpp) wait in their stream (streams.h). The environment sets:
//   HONE_FAKE_GPU_COUNT       number of devices, of which a process may use one; 0: a driver without a device (1)
//   HONE_FAKE_GPU_BYTES       its memory: beyond it, CUDA_ERROR_OUT_OF_MEMORY (16 GiB)
//   HONE_FAKE_GPU_CAPABILITY  compute capability, which also sets the shared memory of a block (9.0)
//   HONE_FAKE_GPU_DRIVER      the driver's CUDA version (13.0)
//   HONE_FAKE_GPU_ORDER       order of threads and blocks: 0 forwards, 1 backwards, from 2 on shuffled by that seed (0)
//   HONE_FAKE_GPU_THREADS     host threads that run blocks (as many as there are processors)
//   HONE_FAKE_GPU_STATS       a file that gets the counts as JSON at exit; %p in it is the process's id
//   HONE_FAKE_GPU_TRACE       1: every launch, product and copy to the host on standard error
//   HONE_FAKE_GPU_BROKEN      a kernel that computes nothing, as if the card could not run it rightly (none)
//   HONE_FAKE_GPU_GRAPHS      0: no stream can be captured (1)
//   HONE_FAKE_GPU_IDLE        1: launches and products are counted and not done, and freed memory is used again at once. What is left is
//                             the host's own time. Results mean nothing
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>

#include "statistics.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fake {

typedef uint64_t Address;

// The values of CUresult that are returned.
enum Result {
    success = 0,
    invalid_value = 1,
    out_of_memory = 2,
    not_initialized = 3,
    no_device = 100,
    invalid_device = 101,
    invalid_context = 201,
    invalid_handle = 400,
    illegal_state = 401,
    not_found = 500,
    not_ready = 600,
    launch_out_of_resources = 701,
    not_supported = 801,
    capture_unsupported = 900,
    capture_invalidated = 901,
    capture_wrong_thread = 908,
};

struct Configuration {
    int devices, order, driver_version, capability_major, capability_minor;
    unsigned host_threads;
    uint64_t memory_bytes;
    bool trace, idle, graphs;
    const char *statistics_file, *broken;
};
const Configuration& configuration();
size_t shared_bytes_a_block();

// Every entry point holds this lock while it uses what follows.
extern std::mutex lock;

struct Statistics : hone_fake_gpu_statistics {};
extern Statistics statistics;

// Memory. All bytes are 0xff when allocated (NaN in f32 and bf16) and inaccessible when freed. A write past the end
// ends the process: at once from the next page on, and before that when the memory is freed.
Result allocate(Address* address, size_t bytes);
Result release(Address address);
// The same for memory of graphs, which is counted by graph_bytes.
Result allocate_uncounted(Address* address, size_t bytes);
void release_uncounted(Address address);
uint64_t live_bytes();
// Whether [address, address + bytes) lies inside one allocation.
bool is_allocated(Address address, uint64_t bytes);
// The beginning of the allocation that an address lies in; 0 if there is none.
Address allocation_of(Address address);

// The pool keeps freed memory until a synchronisation finds more of it than the threshold.
struct Pool {
    uint64_t release_threshold = 0, reserved = 0, reserved_high = 0, used_high = 0;
    void grow();
    void trim(uint64_t keep);
};
extern Pool pool;

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace fake
