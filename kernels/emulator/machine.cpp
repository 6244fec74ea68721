// The rules of the machine: the order in which threads run, their waits for each other, and the faults that end the
// process.
#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "fiber.h"
#include "scheduler.h"

namespace emulator {

thread_local Thread* thread;
thread_local Block* block;
bool (*is_global)(uint64_t address);
bool keeps_order;
void (*before_asynchronous_read)(const void* address, size_t bytes);
void (*after_asynchronous_write)(const void* address, size_t bytes);
void (*at_proxy_fence)();

namespace {

// State of one host thread. It is kept from block to block, because fibers are expensive to make.
struct Scheduler {
    Fiber* host = nullptr;
    std::vector<Fiber*> idle;
    unsigned fibers = 0;
    const std::vector<unsigned>* sequence = nullptr;
    size_t place = 0; // in the sequence: the place of the running thread
    unsigned live = 0, at_barrier = 0;
    void (*call)(void**) = nullptr;
    void** arguments = nullptr;
};
// One load finds it: the default model of a shared library asks the loader by a call, millions of times.
thread_local Scheduler* scheduler __attribute__((tls_model("initial-exec")));

// Gives the stacks back when the host thread ends: a process may map only so many. No block runs then, so all are idle.
struct Owner {
    Scheduler* scheduler = nullptr;
    ~Owner() {
        for (Fiber* fiber : scheduler->idle) end_fiber(fiber);
        delete scheduler->host;
        delete scheduler;
        emulator::scheduler = nullptr;
    }
};

void run_threads();

Fiber* take_fiber() {
    Scheduler& s = *scheduler;
    if (s.idle.empty()) return new_fiber(s.fibers++, run_threads);
    Fiber* fiber = s.idle.back();
    s.idle.pop_back();
    return fiber;
}

const char* name_of(State state) {
    switch (state) {
        case State::at_barrier:
        case State::at_collective:
        case State::at_phase:
        case State::at_named: return "waits at";
        case State::done: return "has returned";
        default: return "runs";
    }
}

[[noreturn]] void die_of_deadlock() {
    fprintf(stderr, "emulator: no thread of the block can go on:\n");
    std::vector<Thread>& threads = block->threads;
    for (size_t i = 0, j; i < threads.size(); i = j) {
        const auto same = [&](const Thread& t) {
            return t.state == threads[i].state && t.site == threads[i].site && t.mask == threads[i].mask &&
                   t.waits_for == threads[i].waits_for;
        };
        for (j = i + 1; j < threads.size() && same(threads[j]);) ++j;
        const Thread& t = threads[i];
        fprintf(stderr, "  threads %zu to %zu: %s", i, j - 1, name_of(t.state));
        if (t.state == State::at_barrier) fprintf(stderr, " %s, %s:%d", t.site->what, t.site->file, t.site->line);
        if (t.state == State::at_collective)
            fprintf(stderr, " %s of lanes %08x, %s:%d", t.site->what, t.mask, t.site->file, t.site->line);
        if (t.state == State::at_phase || t.state == State::at_named) describe_wait(t);
        fprintf(stderr, "\n");
    }
    die("a barrier or a warp collective was not reached by all it is for");
}

// Lets threads go on that wait for a barrier's phase but not forever. Returns whether there are some.
bool give_up() {
    bool some = false;
    for (Thread& t : block->threads) {
        if (t.state != State::at_phase || !t.patient) continue;
        t.state = State::ready;
        some = block->gave_up = true;
    }
    return some;
}

// The next thread in the order that can run after the one that ran; null if all have returned.
Thread* next_thread() {
    Scheduler& s = *scheduler;
    const size_t n = s.sequence->size();
    if (s.live == 0) return nullptr;
    size_t place = s.place;
    for (size_t i = 0; i < n; ++i) {
        if (++place >= n) place = 0;
        Thread* t = &block->threads[(*s.sequence)[place]];
        if (t->state > State::ready) continue;
        s.place = place;
        return t;
    }
    if (give_up()) return next_thread();
    die_of_deadlock();
}

// Gives the host thread to threads that can continue. Returns when this thread can.
void wait_here() {
    Thread* me = thread;
    Thread* next = next_thread();
    if (next == me) return;
    if (next->fiber == nullptr) next->fiber = take_fiber();
    thread = next;
    switch_fiber(me->fiber, next->fiber);
}

// Carries out the collective that `me` waits at, if all of its lanes wait there too.
bool complete_collective(const Thread* me) {
    const unsigned first = me->linear & ~31u;
    Warp& warp = block->warps[first / 32];
    const uint32_t lanes = me->mask & ~warp.gone;
    // Most arrivals end here, without a look at the others.
    if ((lanes & ~warp.waiting) != 0) return false;
    void* operands[32] = {};
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const unsigned i = static_cast<unsigned>(__builtin_ctz(rest));
        const Thread& t = block->threads[first + i];
        if (t.operation != me->operation || t.mask != me->mask) return false;
        operands[i] = t.operand;
    }
    me->operation(operands);
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        block->threads[first + static_cast<unsigned>(__builtin_ctz(rest))].state = State::ready;
    }
    warp.waiting &= ~lanes;
    return true;
}

// A lane that returns may be the last one that others waited for.
void leave_warp(const Thread* leaver) {
    const unsigned first = leaver->linear & ~31u;
    Warp& warp = block->warps[first / 32];
    warp.gone |= 1u << (leaver->linear & 31);
    for (uint32_t rest = warp.waiting; rest != 0; rest &= rest - 1) {
        const Thread& t = block->threads[first + static_cast<unsigned>(__builtin_ctz(rest))];
        if (t.state == State::at_collective && ((t.mask >> (leaver->linear & 31)) & 1)) complete_collective(&t);
    }
}

// The life of a fiber: it runs threads that have not begun, one after the other on the same stack, as long as none
// of them waits.
void run_threads() {
    Scheduler& s = *scheduler;
    Fiber* self = thread->fiber;
    for (;;) {
        thread->state = State::ready;
        s.call(s.arguments);
        check_waited("returns");
        thread->state = State::done;
        --s.live;
        if (s.at_barrier > 0) die("the thread returns, but others of its block wait at a barrier");
        leave_warp(thread);
        Thread* next = next_thread();
        if (next != nullptr && next->fiber == nullptr) {
            next->fiber = self;
            thread = next;
            continue;
        }
        s.idle.push_back(self);
        thread = next;
        switch_fiber(self, next != nullptr ? next->fiber : s.host);
    }
}

}  // namespace

void run_block(Block& running, const std::vector<unsigned>& sequence, void (*call)(void**), void** arguments) {
    if (scheduler == nullptr) {
        static thread_local Owner owner;
        owner.scheduler = scheduler = new Scheduler();
        scheduler->host = host_fiber();
    }
    Scheduler& s = *scheduler;
    for (Thread& t : running.threads) {
        t.state = State::fresh;
        t.fiber = nullptr;
        t.copies.clear();
        t.group = 0;
        t.waited = false;
        t.barriers = t.warp_syncs = 0;
    }
    const size_t n = running.threads.size();
    begin_asynchronous(running);
    running.warps.assign((n + 31) / 32, Warp{0, 0});
    if (n % 32 != 0) running.warps.back().gone = ~0u << (n % 32);
    for (SharedArray& array : running.shared) memset(array.bytes, 0xff, array.length);
    s.sequence = &sequence;
    s.place = 0;
    s.live = static_cast<unsigned>(running.threads.size());
    s.at_barrier = 0;
    s.call = call;
    s.arguments = arguments;
    block = &running;
    thread = &running.threads[sequence[0]];
    thread->fiber = take_fiber();
    switch_fiber(s.host, thread->fiber);
    end_asynchronous(running);
    block = nullptr;
}

void park(State state, const Site* site) {
    thread->state = state;
    thread->site = site;
    wait_here();
}

void barrier(const Site* site) {
    Scheduler& s = *scheduler;
    Thread* me = thread;
    if (s.live < block->threads.size()) die("%s, %s:%d: other threads have returned before it", site->what, site->file, site->line);
    me->state = State::at_barrier;
    me->site = site;
    ++me->barriers;
    if (++s.at_barrier == s.live) {
        for (Thread& t : block->threads) {
            if (t.site != site) die("threads wait at two barriers: lines %d and %d of %s", site->line, t.site->line, site->file);
            t.state = State::ready;
        }
        s.at_barrier = 0;
    }
    wait_here();
}

void collective(uint32_t mask, Operation operation, void* operand, const Site* site) {
    Thread* me = thread;
    if (!((mask >> lane()) & 1)) die("%s, %s:%d: the lane is not in its own mask %08x", site->what, site->file, site->line, mask);
    me->state = State::at_collective;
    me->mask = mask;
    me->operation = operation;
    me->operand = operand;
    me->site = site;
    block->warps[me->linear / 32].waiting |= 1u << lane();
    if (!complete_collective(me)) wait_here();
}

void order_warp(void* const operands[32]) {
    uint32_t latest = 0;
    for (int i = 0; i < 32; ++i) {
        if (operands[i] != nullptr) latest = std::max(latest, static_cast<Thread*>(operands[i])->warp_syncs);
    }
    for (int i = 0; i < 32; ++i) {
        if (operands[i] != nullptr) static_cast<Thread*>(operands[i])->warp_syncs = latest + 1;
    }
    if (!keeps_order) return;
    std::vector<uint32_t> known;
    Thread* const running = thread;
    for (int i = 0; i < 32; ++i) {
        if (operands[i] != nullptr) thread = static_cast<Thread*>(operands[i]), release_order(known);
    }
    for (int i = 0; i < 32; ++i) {
        if (operands[i] != nullptr) thread = static_cast<Thread*>(operands[i]), acquire_order(known);
    }
    thread = running;
}

void check_waited(const char* what) {
    if (block->begins_early && !thread->waited) die("the thread %s before wait_for_earlier_kernels", what);
}

void check_ahead(const void* from, int64_t bytes) {
    // One thread answers for its block.
    if (bytes <= 0 || thread->linear > 0 || is_global == nullptr) return;
    const uint64_t first = reinterpret_cast<uint64_t>(from);
    if (!is_global(first) || !is_global(first + bytes - 1)) {
        die("%lld bytes from %p on are asked for ahead and are not global memory", (long long)bytes, from);
    }
}

void* shared_array(const void* key, size_t bytes) {
    for (const SharedArray& array : block->shared) {
        if (array.key == key) return array.bytes;
    }
    size_t total = bytes;
    for (const SharedArray& array : block->shared) total += array.key == nullptr ? 0 : array.length;
    if (key != nullptr && total > 48 << 10) die("%zu bytes of static shared memory: at most 48 KiB", total);
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes > 0 ? bytes : 1) != 0) die("no memory for %zu bytes of shared memory", bytes);
    memset(memory, 0xff, bytes);
    block->shared.push_back({key, static_cast<unsigned char*>(memory), bytes});
    return memory;
}

void* shared_dynamic() { return shared_array(nullptr, block->dynamic_bytes); }

bool is_shared(const void* address, size_t bytes) {
    const unsigned char* first = static_cast<const unsigned char*>(address);
    return std::any_of(block->shared.begin(), block->shared.end(), [&](const SharedArray& array) {
        return first >= array.bytes && first + bytes <= array.bytes + array.length;
    });
}

void die(const char* format, ...) {
    char reason[512];
    va_list values;
    va_start(values, format);
    vsnprintf(reason, sizeof reason, format, values);
    va_end(values);
    if (block != nullptr && thread != nullptr) {
        fprintf(stderr, "emulator: kernel %s, block (%u, %u, %u), thread (%u, %u, %u): %s\n", block->kernel, block->index.x,
                block->index.y, block->index.z, thread->index.x, thread->index.y, thread->index.z, reason);
    } else {
        fprintf(stderr, "emulator: %s\n", reason);
    }
    abort();
}

}  // namespace emulator
