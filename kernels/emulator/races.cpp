// Checks every access of a kernel and ends the process at the first two that are not ordered.
//
// The compiler's -fsanitize=thread puts a call before each access of a kernel's code. This file answers these calls
// instead of the sanitizer's own library, because it knows what a block is. Two accesses of one byte by two
// threads, one of them a write, are a race unless a __syncthreads lies between them, or a __syncwarp if both
// threads are of one warp. Between two blocks they are always a race. Shuffles, votes and matrix loads order no
// memory, so they do not count. A barrier with phases, or with a number, orders what its threads did before their
// arrival before what others do after their wait. A kernel that begins early may not use global memory before it has
// waited for the kernels before it. Copies of boxes and products of warpgroups are no accesses here. Atomics are left
// out. The check is exact for one run: every reported race is one. Races on paths not taken, or hidden behind a later
// access of the same byte by the same thread, are not seen. Only `kernels/driver/build DEST --races` builds it in; it
// runs all blocks on one host thread.
#include <dlfcn.h>

#include <cstdio>
#include <unordered_map>
#include <vector>

#include "launch.h"

namespace emulator {

namespace {

// The table below must not be used by two threads.
const bool prepared = one_host_thread = keeps_order = true;

// When and by which thread a byte was accessed. `launch` and `barriers` are times; `warp_syncs` is a warp's own
// time.
struct Access {
    uint32_t launch, block, barriers, warp_syncs;
    uint32_t thread, clock;
    const void* code;
};

// The last write and the last two reads by different threads: a write conflicts with either.
struct Byte {
    Access write, read, other_read;
};

const unsigned page_bytes = 1024;
std::unordered_map<uint64_t, std::vector<Byte>>& pages() {
    static std::unordered_map<uint64_t, std::vector<Byte>> table;
    return table;
}

std::vector<Byte>& page_of(uint64_t address) {
    static uint64_t latest = ~uint64_t{0};
    static std::vector<Byte>* bytes;
    static uint32_t launch;
    if (launch != block->launch) { // launches are in order, so everything before this one is forgotten
        launch = block->launch;
        latest = ~uint64_t{0};
        pages().clear();
    }
    if (address / page_bytes != latest) {
        latest = address / page_bytes;
        bytes = &pages()[latest];
        if (bytes->empty()) bytes->resize(page_bytes, Byte());
    }
    return *bytes;
}

bool in_order(const Access& before, const Access& now) {
    if (before.launch != now.launch) return true; // also for bytes never accessed, because launches count from 1
    if (before.block != now.block) return false;
    if (before.thread == now.thread || before.barriers != now.barriers) return true;
    if (thread->known[before.thread] >= before.clock) return true;
    return before.thread / 32 == now.thread / 32 && before.warp_syncs < now.warp_syncs;
}

// "x.cu:12", as far as addr2line knows it: the innermost line outside the emulator.
void print_place(const char* what, const Access& access) {
    fprintf(stderr, "  %s by thread %u of block %u", what, access.thread, access.block);
    Dl_info found;
    char command[1024], place[512] = "";
    if (dladdr(access.code, &found) != 0 && found.dli_fname != nullptr) {
        const long offset = static_cast<const char*>(access.code) - static_cast<const char*>(found.dli_fbase);
        snprintf(command, sizeof command,
                 "addr2line -i -e '%s' %#lx 2>/dev/null | grep -v '/emulator/[a-z_0-9]*[.]h:' | grep -m1 -o '[^/]*[.]c*u*h*:[0-9]*'",
                 found.dli_fname, offset - 1);
        FILE* pipe = popen(command, "r");
        if (pipe != nullptr && fgets(place, sizeof place, pipe) == nullptr) place[0] = 0;
        if (pipe != nullptr) pclose(pipe);
    }
    fprintf(stderr, place[0] != 0 ? ", %s" : "\n%s", place);
}

[[noreturn]] void die_of_race(uint64_t address, bool shared, const Access& before, bool wrote_before, const Access& now, bool writes) {
    fprintf(stderr, "emulator: two accesses of %s memory at %#llx are in no order:\n", shared ? "shared" : "global",
            static_cast<unsigned long long>(address));
    print_place(wrote_before ? "written" : "read", before);
    print_place(writes ? "written" : "read", now);
    die("a race: a barrier is missing between the two");
}

// Pieces of 16 bytes of shared memory that a thread wrote and has not ordered before reads by copies and products.
struct Written {
    uint32_t block, thread;
};
std::unordered_map<uint64_t, Written>& written() {
    static std::unordered_map<uint64_t, Written> table;
    return table;
}
const bool asks = [] {
    before_asynchronous_read = [](const void* address, size_t bytes) {
        const uint64_t first = reinterpret_cast<uint64_t>(address) / 16, last = (reinterpret_cast<uint64_t>(address) + bytes - 1) / 16;
        for (uint64_t piece = first; piece <= last; ++piece) {
            const auto found = written().find(piece);
            if (found != written().end() && found->second.block == block->serial)
                die("a product reads shared memory that thread %u wrote without fence_proxy_async", found->second.thread);
        }
    };
    after_asynchronous_write = [](const void* address, size_t bytes) {
        for (size_t at = 0; at < bytes; at += 16) written().erase(reinterpret_cast<uint64_t>(address) / 16 + at / 16);
    };
    at_proxy_fence = [] {
        for (auto at = written().begin(); at != written().end();) {
            const bool own = at->second.thread == thread->linear && at->second.block == block->serial;
            at = own ? written().erase(at) : std::next(at);
        }
    };
    return true;
}();

void touch(uint64_t address, size_t bytes, bool writes, const void* code) {
    if (block == nullptr) return;
    const bool shared = is_shared(reinterpret_cast<const void*>(address), 1);
    if (shared && writes && !block->phases.empty()) written()[address / 16] = {block->serial, thread->linear};
    if (!shared && (is_global == nullptr || !is_global(address))) return;
    if (!shared) check_waited(writes ? "writes to global memory" : "reads global memory");
    // Shared memory of another block is other memory at the same address, so its time begins anew.
    const uint32_t linear = (block->index.z * block->grid.y + block->index.y) * block->grid.x + block->index.x;
    const Access now = {shared ? block->serial : block->launch, linear, thread->barriers, thread->warp_syncs, thread->linear, thread->known[thread->linear],
                        code};
    for (uint64_t at = address; at < address + bytes; ++at) {
        Byte& byte = page_of(at)[at % page_bytes];
        if (!in_order(byte.write, now)) die_of_race(at, shared, byte.write, true, now, writes);
        if (!writes) {
            if (byte.read.launch != now.launch || byte.read.thread != now.thread || byte.read.block != now.block) byte.other_read = byte.read;
            byte.read = now;
            continue;
        }
        if (!in_order(byte.read, now)) die_of_race(at, shared, byte.read, false, now, true);
        if (!in_order(byte.other_read, now)) die_of_race(at, shared, byte.other_read, false, now, true);
        byte.write = now;
    }
}

}  // namespace
}  // namespace emulator

// The functions that gcc calls; the names are gcc's.
#define HOOK extern "C" __attribute__((visibility("default"))) void
#define TOUCH(bytes, writes) emulator::touch(reinterpret_cast<uint64_t>(address), bytes, writes, __builtin_return_address(0))
#define HOOKS(bytes)                                                                    \
    HOOK __tsan_read##bytes(void* address) { TOUCH(bytes, false); }                     \
    HOOK __tsan_write##bytes(void* address) { TOUCH(bytes, true); }                     \
    HOOK __tsan_unaligned_read##bytes(void* address) { TOUCH(bytes, false); }           \
    HOOK __tsan_unaligned_write##bytes(void* address) { TOUCH(bytes, true); }           \
    HOOK __tsan_volatile_read##bytes(void* address) { TOUCH(bytes, false); }            \
    HOOK __tsan_volatile_write##bytes(void* address) { TOUCH(bytes, true); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
HOOK __tsan_read_range(void* address, size_t bytes) { TOUCH(bytes, false); }
HOOK __tsan_write_range(void* address, size_t bytes) { TOUCH(bytes, true); }
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
HOOK __tsan_vptr_update(void**, void*) {}
HOOK __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
#define ATOMIC_HOOKS(bits)                                                                                                         \
    extern "C" __attribute__((visibility("default"))) uint##bits##_t __tsan_atomic##bits##_load(const uint##bits##_t* at, int) {   \
        return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                                              \
    }                                                                                                                              \
    extern "C" __attribute__((visibility("default"))) int __tsan_atomic##bits##_compare_exchange_strong(                           \
        uint##bits##_t* at, uint##bits##_t* expected, uint##bits##_t wanted, int, int) {                                           \
        return __atomic_compare_exchange_n(at, expected, wanted, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                       \
    }
ATOMIC_HOOKS(16)
ATOMIC_HOOKS(32)
ATOMIC_HOOKS(64)
