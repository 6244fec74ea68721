// A launch: checked against the device's limits, then its blocks are distributed over the host's threads.
#include "launch.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>

#include "faults.h"
#include "scheduler.h"

// The kernel's own macros, not needed here.
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulator {

bool one_host_thread;

namespace {

std::vector<unsigned> sequence_of(unsigned count, int order) {
    std::vector<unsigned> sequence(count);
    std::iota(sequence.begin(), sequence.end(), 0u);
    if (order == 1) std::reverse(sequence.begin(), sequence.end());
    if (order >= 2) std::shuffle(sequence.begin(), sequence.end(), std::mt19937(static_cast<unsigned>(order) * 7919u + count));
    return sequence;
}

uint3 index_of(uint64_t linear, dim3 extent) {
    const uint64_t plane = static_cast<uint64_t>(extent.x) * extent.y;
    return {static_cast<unsigned>(linear % extent.x), static_cast<unsigned>(linear % plane / extent.x),
            static_cast<unsigned>(linear / plane)};
}

struct Work {
    const Kernel* kernel;
    dim3 grid, size;
    size_t dynamic_bytes, shared_bytes_max;
    void** arguments;
    int order;
    bool begins_early;
    uint64_t blocks;
    uint32_t serial;
    std::vector<unsigned> sequence;
    std::atomic<uint64_t> next{0};
    std::atomic<size_t> shared_bytes{0};
};

// The order of blocks. An odd stride without a small factor in common with most counts replaces a shuffle.
uint64_t block_in_order(uint64_t turn, uint64_t blocks, int order) {
    if (order == 1) return blocks - 1 - turn;
    if (order < 2 || blocks % 7919 == 0) return turn;
    return static_cast<uint64_t>(static_cast<unsigned __int128>(turn) * 7919 + static_cast<unsigned>(order)) % blocks;
}

void run_blocks(Work& work) {
    prepare_fault_stack();
    static thread_local Block running;  // its vectors keep their memory from launch to launch
    running.grid = work.grid;
    running.size = work.size;
    running.kernel = work.kernel->name;
    running.dynamic_bytes = work.dynamic_bytes;
    running.launch = work.serial;
    running.order = work.order;
    running.begins_early = work.begins_early;
    running.threads.resize(work.sequence.size());
    for (unsigned i = 0; i < running.threads.size(); ++i) {
        running.threads[i].index = index_of(i, work.size);
        running.threads[i].linear = i;
    }
    for (uint64_t turn; (turn = work.next.fetch_add(1)) < work.blocks;) {
        ++running.serial;
        running.index = index_of(block_in_order(turn, work.blocks, work.order), work.grid);
        run_block(running, work.sequence, work.kernel->call, work.arguments);
    }
    size_t shared_bytes = 0;
    for (const SharedArray& array : running.shared) {
        shared_bytes += array.length;
        free(array.bytes);
    }
    running.shared.clear();
    for (size_t seen = work.shared_bytes; seen < shared_bytes && !work.shared_bytes.compare_exchange_weak(seen, shared_bytes);) {
    }
}

// Host threads that wait for work as long as the process runs.
class Helpers {
  public:
    void run(Work& work, unsigned helpers) {
        std::unique_lock<std::mutex> hold(lock);
        while (threads < helpers) {
            std::thread([this, number = threads] { serve(number); }).detach();
            ++threads;
        }
        current = &work;
        wanted = running = helpers;
        ++generation;
        wake.notify_all();
        hold.unlock();
        run_blocks(work);
        hold.lock();
        finished.wait(hold, [this] { return running == 0; });
        current = nullptr;
    }

  private:
    void serve(unsigned number) {
        uint64_t seen = 0;
        for (;;) {
            std::unique_lock<std::mutex> hold(lock);
            wake.wait(hold, [&] { return generation != seen && current != nullptr; });
            seen = generation;
            if (number >= wanted) continue;
            Work& work = *current;
            hold.unlock();
            run_blocks(work);
            hold.lock();
            if (--running == 0) finished.notify_one();
        }
    }

    std::mutex lock;
    std::condition_variable wake, finished;
    Work* current = nullptr;
    unsigned threads = 0, wanted = 0, running = 0;
    uint64_t generation = 0;
};

}  // namespace

std::vector<Kernel>& kernels() {
    static std::vector<Kernel>* table = new std::vector<Kernel>();  // read by the functions that run at exit
    return *table;
}

Registration::Registration(const char* name, void (*call)(void**), std::vector<Parameter> parameters) {
    Kernel kernel;
    kernel.name = name;
    kernel.call = call;
    kernel.parameters = std::move(parameters);
    kernels().push_back(std::move(kernel));
}

Kernel* find_kernel(const char* name) {
    for (Kernel& kernel : kernels()) {
        if (strcmp(kernel.name, name) == 0) return &kernel;
    }
    return nullptr;
}

Refusal launch(Kernel& kernel, dim3 grid, dim3 size, size_t dynamic_bytes, void** arguments, const Limits& limits, int order,
               unsigned host_threads, bool begins_early) {
    const uint64_t threads = static_cast<uint64_t>(size.x) * size.y * size.z;
    if (threads == 0 || threads > 1024 || size.z > 64) return Refusal::invalid_value;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return Refusal::invalid_value;
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return Refusal::invalid_value;
    if (dynamic_bytes > kernel.dynamic_bytes_max || dynamic_bytes > limits.shared_bytes_a_block) return Refusal::invalid_value;

    Work work;
    work.kernel = &kernel;
    work.grid = grid;
    work.size = size;
    work.dynamic_bytes = dynamic_bytes;
    work.arguments = arguments;
    work.order = order;
    work.begins_early = begins_early;
    work.blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    static std::atomic<uint32_t> launches{0};
    work.serial = ++launches;
    work.sequence = sequence_of(static_cast<unsigned>(threads), order);

    const FaultWatch watch;
    // Waking a helper takes some 10 us, so it is not worth it for a few threads.
    if (host_threads > 1 && !one_host_thread && work.blocks > 1 && work.blocks * threads >= 1024) {
        static Helpers* helpers = new Helpers();  // never destroyed: its threads outlive main
        helpers->run(work, host_threads - 1);
    } else {
        run_blocks(work);
    }
    ++kernel.launches;
    kernel.threads_max = std::max(kernel.threads_max, static_cast<unsigned>(threads));
    kernel.shared_bytes_max = std::max<size_t>(kernel.shared_bytes_max, work.shared_bytes);
    return work.shared_bytes > limits.shared_bytes_a_block ? Refusal::too_many_resources : Refusal::none;
}

}  // namespace emulator
