// The device's configuration, memory and counts.
#include "device.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../emulator/launch.h"
#include "graphs.h"
#include "streams.h"

namespace fake {

std::mutex lock;
Statistics statistics;
Pool pool;

namespace {

// "9.0" and "13.0": the numbers before and after the point.
void read_version(const char* variable, int* major, int* minor) {
    const char* text = getenv(variable);
    if (text == nullptr) return;
    if (sscanf(text, "%d.%d", major, minor) != 2) die("%s=%s: expected a version such as 9.0", variable, text);
}

uint64_t read_number(const char* variable, uint64_t otherwise) {
    const char* text = getenv(variable);
    if (text == nullptr) return otherwise;
    char* end = nullptr;
    const uint64_t number = strtoull(text, &end, 10);
    if (end == text || *end != 0) die("%s=%s: expected a number", variable, text);
    return number;
}

Configuration read_configuration() {
    Configuration c = {};
    int driver_major = 13, driver_minor = 0;
    c.capability_major = 9;
    read_version("HONE_FAKE_GPU_CAPABILITY", &c.capability_major, &c.capability_minor);
    read_version("HONE_FAKE_GPU_DRIVER", &driver_major, &driver_minor);
    c.driver_version = driver_major * 1000 + driver_minor * 10;
    c.devices = static_cast<int>(read_number("HONE_FAKE_GPU_COUNT", 1));
    if (c.devices > 64) die("HONE_FAKE_GPU_COUNT=%d: 64 devices at most", c.devices);
    c.memory_bytes = read_number("HONE_FAKE_GPU_BYTES", uint64_t{16} << 30);
    c.order = static_cast<int>(read_number("HONE_FAKE_GPU_ORDER", 0));
    c.host_threads = static_cast<unsigned>(
        read_number("HONE_FAKE_GPU_THREADS", std::max(1u, std::min(8u, std::thread::hardware_concurrency()))));
    c.trace = read_number("HONE_FAKE_GPU_TRACE", 0) != 0;
    c.idle = read_number("HONE_FAKE_GPU_IDLE", 0) != 0;
    c.graphs = read_number("HONE_FAKE_GPU_GRAPHS", 1) != 0;
    c.statistics_file = getenv("HONE_FAKE_GPU_STATS");
    c.broken = getenv("HONE_FAKE_GPU_BROKEN");
    return c;
}

// An allocation is whole pages; its end lies before a page that cannot be accessed, as closely as alignment allows.
struct Allocation {
    size_t bytes;
    unsigned char* mapping;
    size_t mapping_bytes;
};
std::map<Address, Allocation>& allocations() {
    static std::map<Address, Allocation> table;
    return table;
}

const size_t page = 4096;
const size_t alignment = 256;
const unsigned char poison = 0xff, canary = 0xa5;
// Beyond this size only the beginning of an allocation is poisoned: writing gigabytes would take longer than any
// test.
const size_t poisoned_bytes_max = 64 << 20;

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

#if defined(__SANITIZE_ADDRESS__)
// The sanitizer's allocator knows the end of each allocation and keeps freed memory from being used.
Allocation take(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, bytes) != 0) return {0, nullptr, 0};
    return {bytes, static_cast<unsigned char*>(memory), bytes};
}
unsigned char* start_of(const Allocation& allocation) { return allocation.mapping; }
void give_back(const Allocation& allocation) { free(allocation.mapping); }
#else
Allocation take(size_t bytes) {
    const size_t usable = rounded(bytes, page);
    void* mapping = mmap(nullptr, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return {0, nullptr, 0};
    unsigned char* first = static_cast<unsigned char*>(mapping);
    mprotect(first + usable, page, PROT_NONE);
    const Allocation allocation = {bytes, first, usable + page};
    return allocation;
}
unsigned char* start_of(const Allocation& allocation) {
    const size_t usable = allocation.mapping_bytes - page;
    return allocation.mapping + usable - rounded(allocation.bytes, alignment);
}
// The bytes between the end and the next multiple of the alignment.
void check_canary(const Allocation& allocation) {
    const unsigned char* end = allocation.mapping + allocation.mapping_bytes - page;
    for (const unsigned char* p = start_of(allocation) + allocation.bytes; p < end; ++p) {
        if (*p != canary) die("memory was written up to %zu bytes behind an allocation of %zu bytes", static_cast<size_t>(end - p), allocation.bytes);
    }
}
void give_back(const Allocation& allocation) {
    check_canary(allocation);
    munmap(allocation.mapping, allocation.mapping_bytes);
}
#endif

// Memory that an idle device has freed, by size.
std::map<size_t, std::vector<Allocation>>& idle_memory() {
    static std::map<size_t, std::vector<Allocation>> table;
    return table;
}

// Memory of so many bytes that an idle device has freed; false if there is none.
bool take_again(size_t bytes, Allocation* allocation) {
    std::vector<Allocation>& freed = idle_memory()[bytes];
    if (freed.empty()) return false;
    *allocation = freed.back();
    freed.pop_back();
    return true;
}

// Writes the report when the process ends.
struct Report {
    ~Report() {
        FILE* file = open();
        if (file == nullptr) return;
        const Statistics& s = statistics;
        const auto line = [&](const char* name, uint64_t value) { fprintf(file, "  \"%s\": %llu,\n", name, (unsigned long long)value); };
        fprintf(file, "{\n");
        line("launches", s.launches);
        line("products", s.products);
        line("allocations", s.allocations);
        line("frees", s.frees);
        line("live_bytes", s.live_bytes);
        line("peak_bytes", s.peak_bytes);
        line("host_synchronizations", s.host_synchronizations);
        line("device_to_host_copies", s.device_to_host_copies);
        line("device_to_host_bytes", s.device_to_host_bytes);
        line("host_to_device_copies", s.host_to_device_copies);
        line("host_to_device_bytes", s.host_to_device_bytes);
        line("device_to_device_copies", s.device_to_device_copies);
        line("fills", s.fills);
        line("events", s.events);
        line("choices", s.choices);
        line("graphs", s.graphs);
        line("graph_launches", s.graph_launches);
        line("graph_bytes", s.graph_bytes);
        line("early_launches", s.early_launches);
        line("early_edges", s.early_edges);
        fprintf(file, "  \"kernels\": {");
        const char* separator = "\n";
        for (const emulator::Kernel& kernel : emulator::kernels()) {
            if (kernel.launches == 0) continue;
            fprintf(file, "%s    \"%s\": {\"launches\": %llu, \"threads_max\": %u, \"shared_bytes_max\": %zu}", separator, kernel.name,
                    (unsigned long long)kernel.launches, kernel.threads_max, kernel.shared_bytes_max);
            separator = ",\n";
        }
        fprintf(file, "\n  }\n}\n");
        fclose(file);
    }

    // If the name holds %p, each of several processes has its own file.
    static FILE* open() {
        if (configuration().statistics_file == nullptr) return nullptr;
        std::string path = configuration().statistics_file;
        const size_t at = path.find("%p");
        if (at != std::string::npos) path.replace(at, 2, std::to_string(getpid()));
        return fopen(path.c_str(), "w");
    }
} report;

}  // namespace

const Configuration& configuration() {
    static const Configuration read = read_configuration();
    return read;
}

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": all but 1 KiB of the multiprocessor's.
size_t shared_bytes_a_block() {
    const Configuration& c = configuration();
    if (c.capability_major == 9 || c.capability_major == 10) return 227 << 10;
    return c.capability_major == 8 && (c.capability_minor == 0 || c.capability_minor == 7) ? 163 << 10 : 99 << 10;
}

Result allocate(Address* address, size_t bytes) {
    if (statistics.live_bytes + graph_bytes() + bytes > configuration().memory_bytes) return out_of_memory;
    const Result result = allocate_uncounted(address, bytes);
    if (result != success) return result;
    ++statistics.allocations;
    statistics.live_bytes += bytes;
    statistics.peak_bytes = std::max(statistics.peak_bytes, statistics.live_bytes);
    pool.grow();
    return success;
}

Result allocate_uncounted(Address* address, size_t bytes) {
    if (bytes == 0) return invalid_value;
    Allocation allocation = {};
    const bool again = configuration().idle && take_again(bytes, &allocation);
    if (!again) allocation = take(bytes);
    if (allocation.mapping == nullptr) return out_of_memory;
    unsigned char* start = start_of(allocation);
    if (!again) {
        memset(start, poison, std::min(bytes, poisoned_bytes_max));
#if !defined(__SANITIZE_ADDRESS__)
        memset(start + bytes, canary, rounded(bytes, alignment) - bytes);
#endif
    }
    *address = reinterpret_cast<Address>(start);
    allocations()[*address] = allocation;
    return success;
}

Result release(Address address) {
    if (address == 0) return success;
    const auto found = allocations().find(address);
    if (found == allocations().end()) return invalid_value;
    ++statistics.frees;
    statistics.live_bytes -= found->second.bytes;
    release_uncounted(address);
    return success;
}

void release_uncounted(Address address) {
    const auto found = allocations().find(address);
    forget(address, found->second.bytes);
    if (configuration().idle) idle_memory()[found->second.bytes].push_back(found->second);
    else give_back(found->second);
    allocations().erase(found);
}

uint64_t live_bytes() { return statistics.live_bytes; }

bool is_allocated(Address address, uint64_t bytes) {
    auto found = allocations().upper_bound(address);
    if (found == allocations().begin()) return false;
    --found;
    return address + bytes <= found->first + found->second.bytes;
}

Address allocation_of(Address address) {
    auto found = allocations().upper_bound(address);
    if (found == allocations().begin()) return 0;
    --found;
    return address < found->first + found->second.bytes ? found->first : 0;
}

void Pool::grow() {
    reserved = std::max<uint64_t>(reserved, rounded(statistics.live_bytes, 2 << 20));
    reserved_high = std::max(reserved_high, reserved);
    used_high = std::max(used_high, statistics.live_bytes);
}

void Pool::trim(uint64_t keep) {
    const uint64_t used = rounded(statistics.live_bytes, 2 << 20);
    if (reserved > keep) reserved = std::max(used, keep);
}

void die(const char* format, ...) {
    va_list values;
    va_start(values, format);
    fprintf(stderr, "fake GPU: ");
    vfprintf(stderr, format, values);
    fprintf(stderr, "\n");
    va_end(values);
    abort();
}

}  // namespace fake

EXPORT size_t hone_fake_gpu_stats(hone_fake_gpu_statistics* to, size_t bytes) {
    const std::lock_guard<std::mutex> hold(fake::lock);
    const hone_fake_gpu_statistics& from = fake::statistics;
    memcpy(to, &from, std::min(bytes, sizeof from));
    return sizeof from;
}

EXPORT uint64_t hone_fake_gpu_launches(const char* kernel) {
    const std::lock_guard<std::mutex> hold(fake::lock);
    const emulator::Kernel* found = emulator::find_kernel(kernel);
    return found == nullptr ? 0 : found->launches;
}
