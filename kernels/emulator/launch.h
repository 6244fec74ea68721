// Runs a kernel, given its name, its grid and its arguments; also holds the table of all kernels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "machine.h"

namespace emulator {

struct Parameter {
    size_t offset, bytes;
};

struct Kernel {
    const char* name;
    void (*call)(void** arguments);
    std::vector<Parameter> parameters;
    size_t dynamic_bytes_max = 48 << 10; // more must be requested by cuFuncSetAttribute

    // Properties of its launches, for the driver's report.
    uint64_t launches = 0;
    unsigned threads_max = 0;
    size_t shared_bytes_max = 0;
};

// The device's limits, which every launch is checked against.
struct Limits {
    size_t shared_bytes_a_block = 227 << 10;
};

enum class Refusal { none, invalid_value, too_many_resources };

// Set if host threads must not share the tool that observes the kernels.
extern bool one_host_thread;

std::vector<Kernel>& kernels();
Kernel* find_kernel(const char* name);

// Runs every block. `order` applies to blocks and to the threads within one: 0 forwards, 1 backwards, from 2 on
// shuffled by that seed. Independent blocks run on `host_threads` threads of the host. A kernel that `begins_early`
// may begin beside the one before it on a device, so each of its threads must wait before it uses global memory.
Refusal launch(Kernel& kernel, dim3 grid, dim3 size, size_t dynamic_bytes, void** arguments, const Limits& limits, int order,
               unsigned host_threads, bool begins_early = false);

template <class... Arguments, size_t... i>
void call_with(void (*kernel)(Arguments...), void** arguments, std::index_sequence<i...>) {
    kernel(*static_cast<typename std::remove_const<Arguments>::type*>(arguments[i])...);
}

// Offsets of the parameters as on the device: each is aligned to its own alignment.
template <class... Arguments>
std::vector<Parameter> parameters_of(void (*)(Arguments...)) {
    std::vector<Parameter> parameters;
    size_t offset = 0;
    (void)std::initializer_list<int>{(offset = (offset + alignof(Arguments) - 1) / alignof(Arguments) * alignof(Arguments),
                                      parameters.push_back({offset, sizeof(Arguments)}), offset += sizeof(Arguments), 0)...};
    return parameters;
}

struct Registration {
    Registration(const char* name, void (*call)(void**), std::vector<Parameter> parameters);
};

}  // namespace emulator

// Adds a kernel to the table. The driver's build script writes one line for each extern "C" function of a .cu file.
#define EMULATED_KERNEL(name)                                                                              \
    template <class... Arguments>                                                                          \
    static void name##_call(void (*kernel)(Arguments...), void** arguments) {                              \
        emulator::call_with(kernel, arguments, std::index_sequence_for<Arguments...>{});                   \
    }                                                                                                      \
    static emulator::Registration name##_entry(                                                            \
        #name, [](void** arguments) { name##_call(name, arguments); }, emulator::parameters_of(name))
