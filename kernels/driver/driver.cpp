// libcuda over host memory and the emulator: devices, contexts, memory, modules and launches.
//
// Work that is asynchronous on a device is done at once, with exceptions that only a wrong program can notice. A copy
// between the device and pinned memory waits in its stream until something waits for it (streams.cpp). The host sees
// what arrives when it has waited itself; until then the memory holds 0xff for it. Pinned memory that a copy reads from
// must still hold the same bytes when the host has waited (transfers.cpp).
#include "device.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "../emulator/launch.h"
#include "graphs.h"
#include "streams.h"
#include "transfers.h"

using namespace fake;

#define API EXPORT int
// The next work on a stream, and two addresses that it uses.
#define USES(stream, a, b) (begin(stream), touch(stream, a), touch(stream, b))
#define LOCKED const std::lock_guard<std::mutex> hold(lock)
// Functions that need a current context on the calling thread.
#define IN_CONTEXT                                      \
    if (current_context == nullptr) return invalid_context; \
    LOCKED

namespace {

thread_local void* current_context;
int the_context, the_module, the_pool, used_device = -1;

bool initialized;

// The launch holds the lock while a kernel calls this.
const bool prepared = (emulator::is_global = [](uint64_t address) { return is_allocated(address, 1); }) != nullptr;

int attribute(int which) {
    const Configuration& c = configuration();
    switch (which) {
        case 1: return 1024;           // MAX_THREADS_PER_BLOCK
        case 2: case 3: return 1024;   // MAX_BLOCK_DIM_X, _Y
        case 4: return 64;             // MAX_BLOCK_DIM_Z
        case 5: return 0x7fffffff;     // MAX_GRID_DIM_X
        case 6: case 7: return 65535;  // MAX_GRID_DIM_Y, _Z
        case 8: return 48 << 10;       // MAX_SHARED_MEMORY_PER_BLOCK
        case 10: return 32;            // WARP_SIZE
        case 12: return 65536;         // MAX_REGISTERS_PER_BLOCK
        case 13: return 1980000;       // CLOCK_RATE, kHz
        case 16: return 132;           // MULTIPROCESSOR_COUNT
        case 33: return 0x18;          // PCI_BUS_ID
        case 36: return 3201000;       // MEMORY_CLOCK_RATE, kHz
        case 37: return 6144;          // GLOBAL_MEMORY_BUS_WIDTH, bits
        case 38: return 50 << 20;      // L2_CACHE_SIZE
        case 39: return 2048;          // MAX_THREADS_PER_MULTIPROCESSOR
        case 41: return 1;             // UNIFIED_ADDRESSING
        case 75: return c.capability_major;
        case 76: return c.capability_minor;
        case 81: return static_cast<int>(shared_bytes_a_block()) + 1024;  // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
        case 97: return static_cast<int>(shared_bytes_a_block());         // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        case 115: return 1;            // MEMORY_POOLS_SUPPORTED
        default: return 0;
    }
}

void host_waited() {
    ++statistics.host_synchronizations;
    finish_transfers();
    pool.trim(pool.release_threshold);
}

void host_waits() {
    host_waits_for_all();
    host_waited();
}

const size_t tensor_map_bytes = 128;

// The memory that a launch may read or write: the allocations of its pointers and tensor maps.
void touch_arguments(void* stream, const emulator::Kernel& kernel, void** arguments) {
    for (size_t i = 0; i < kernel.parameters.size(); ++i) {
        Address address;
        if (kernel.parameters[i].bytes == tensor_map_bytes) {
            emulator::TensorMapBits map;
            memcpy(&map, arguments[i], sizeof map);
            touch(stream, map.base);
        }
        if (kernel.parameters[i].bytes != sizeof address) continue;
        memcpy(&address, arguments[i], sizeof address);
        touch(stream, address);
    }
}

struct Shape {
    dim3 grid, size;
    unsigned dynamic_bytes;
    bool begins_early;
};

int launch(emulator::Kernel& kernel, const Shape& shape, void* stream, void** arguments) {
    const Configuration& c = configuration();
    ++statistics.launches;
    if (shape.begins_early) ++statistics.early_launches;
    if (c.idle) return success;
    begin(stream);
    touch_arguments(stream, kernel, arguments);
    if (c.trace) {
        fprintf(stderr, "fake GPU: %s, grid (%u, %u, %u), block (%u, %u, %u), %u bytes\n", kernel.name, shape.grid.x, shape.grid.y,
                shape.grid.z, shape.size.x, shape.size.y, shape.size.z, shape.dynamic_bytes);
    }
    if (c.broken != nullptr && strcmp(c.broken, kernel.name) == 0) return success;
    emulator::Limits limits;
    limits.shared_bytes_a_block = shared_bytes_a_block();
    switch (emulator::launch(kernel, shape.grid, shape.size, shape.dynamic_bytes, arguments, limits, c.order, c.host_threads,
                             shape.begins_early)) {
        case emulator::Refusal::none: return success;
        case emulator::Refusal::invalid_value: return invalid_value;
        case emulator::Refusal::too_many_resources: return launch_out_of_resources;
    }
    return invalid_value;
}

// A launch's arguments, copied.
struct Arguments {
    struct alignas(tensor_map_bytes) Value {
        unsigned char bytes[tensor_map_bytes];
    };
    std::vector<Value> values;
    std::vector<void*> pointers;

    Arguments(const emulator::Kernel& kernel, void** from) : values(kernel.parameters.size()) {
        for (size_t i = 0; i < values.size(); ++i) {
            memcpy(&values[i], from[i], kernel.parameters[i].bytes);
            pointers.push_back(&values[i]);
        }
    }
};

int launch_or_record(void* function, const Shape& shape, void* stream, void** arguments) {
    emulator::Kernel& kernel = *static_cast<emulator::Kernel*>(function);
    if (!is_captured(stream)) return launch(kernel, shape, stream, arguments);
    const auto kept = std::make_shared<Arguments>(kernel, arguments);
    const NodeKind kind = shape.begins_early ? NodeKind::early_kernel : NodeKind::kernel;
    return record(stream, [&kernel, shape, kept](void* s) { return launch(kernel, shape, s, kept->pointers.data()); }, kind);
}

// CUlaunchAttribute and CUlaunchConfig of cuda.h.
struct LaunchAttribute {
    int which;
    char unused[4];
    union {
        int number;
        char bytes[64];
    };
};
struct LaunchConfiguration {
    unsigned grid_x, grid_y, grid_z, size_x, size_y, size_z, dynamic_bytes;
    void* stream;
    const LaunchAttribute* attributes;
    unsigned attribute_count;
};

// The code that a card runs is that of build.rs: from 9.0 on it has instructions that wait for the kernels before it.
const int waits_from = 90;
int virtual_architecture() { return configuration().capability_major >= 9 ? waits_from : 80; }

}  // namespace

// The driver and its devices.
API cuInit(unsigned) {
    if (configuration().devices == 0) return no_device;
    initialized = true;
    return success;
}
API cuDriverGetVersion(int* version) {
    *version = configuration().driver_version;
    return success;
}
API cuDeviceGetCount(int* count) {
    *count = configuration().devices;
    return initialized ? success : not_initialized;
}
API cuDeviceGet(int* device, int number) {
    *device = number;
    if (!initialized) return not_initialized;
    return number >= 0 && number < configuration().devices ? success : invalid_device;
}
API cuDeviceGetAttribute(int* value, int which, int) {
    *value = attribute(which);
    return success;
}
API cuDeviceGetName(char* name, int length, int) {
    snprintf(name, static_cast<size_t>(length), "hone emulated GPU");
    return success;
}
API cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = configuration().memory_bytes;
    return success;
}
API cuDeviceGetUuid_v2(unsigned char* bytes, int device) {
    for (int i = 0; i < 16; ++i) bytes[i] = static_cast<unsigned char>(i + device);
    return success;
}
API cuDeviceGetPCIBusId(char* name, int length, int device) {
    snprintf(name, static_cast<size_t>(length), "0000:%02x:00.0", 0x18 + device);
    return success;
}

// One context, of the device that the process uses: all devices look alike, and their memory is the process's own.
API cuDevicePrimaryCtxRetain(void** context, int device) {
    LOCKED;
    if (used_device >= 0 && used_device != device) die("a process uses device %d and device %d", used_device, device);
    used_device = device;
    *context = &the_context;
    return initialized ? success : not_initialized;
}
API cuDevicePrimaryCtxRelease_v2(int) { return success; }
API cuCtxDestroy_v2(void*) { return success; }
API cuCtxGetCurrent(void** context) {
    *context = current_context;
    return success;
}
API cuCtxSetCurrent(void* context) {
    if (context != nullptr && context != &the_context) return invalid_context;
    current_context = context;
    return success;
}
API cuCtxGetDevice(int* device) {
    *device = used_device;
    return current_context != nullptr ? success : invalid_context;
}
API cuCtxSynchronize() {
    IN_CONTEXT;
    NOT_IN_CAPTURE;
    host_waits();
    return success;
}

// Memory.
API cuMemGetInfo_v2(size_t* free, size_t* total) {
    IN_CONTEXT;
    *total = configuration().memory_bytes;
    *free = *total - live_bytes() - graph_bytes();
    return success;
}
API cuMemAlloc_v2(Address* address, size_t bytes) {
    IN_CONTEXT;
    NOT_IN_CAPTURE;
    return allocate(address, bytes);
}
API cuMemAllocAsync(Address* address, size_t bytes, void* stream) {
    IN_CONTEXT;
    if (is_captured(stream)) return record_allocation(stream, address, bytes);
    const Result result = allocate(address, bytes);
    // Other streams may use the memory only behind this moment.
    if (result == success && !configuration().idle) USES(stream, *address, *address);
    return result;
}
API cuMemFree_v2(Address address) {
    IN_CONTEXT;
    NOT_IN_CAPTURE;
    host_waits(); // as the driver's function does
    return release(address);
}
API cuMemFreeAsync(Address address, void* stream) {
    IN_CONTEXT;
    if (is_captured(stream)) return record_release(stream, address);
    if (configuration().idle) return release(address);
    begin(stream);
    check_free(stream, address);
    return release(address);
}
API cuDeviceGetDefaultMemPool(void** to, int) {
    *to = &the_pool;
    return success;
}
API cuDeviceGetMemPool(void** to, int) {
    *to = &the_pool;
    return success;
}
API cuMemPoolTrimTo(void*, size_t keep) {
    LOCKED;
    pool.trim(keep);
    return success;
}
API cuMemPoolSetAttribute(void*, int which, void* value) {
    LOCKED;
    uint64_t number;
    switch (which) {
        case 1: case 2: case 3: return success;  // how freed memory may be used again: 32-bit switches
        case 4:
            memcpy(&pool.release_threshold, value, sizeof pool.release_threshold);
            return success;
        case 6: case 8: // high-water marks: may only be set to 0, which means the current value
            memcpy(&number, value, sizeof number);
            if (number != 0) return invalid_value;
            (which == 6 ? pool.reserved_high : pool.used_high) = which == 6 ? pool.reserved : live_bytes();
            return success;
        default: return invalid_value;
    }
}
API cuMemPoolGetAttribute(void*, int which, void* value) {
    LOCKED;
    const uint64_t values[] = {pool.release_threshold, pool.reserved, pool.reserved_high, live_bytes(), pool.used_high};
    if (which < 4 || which > 8) return invalid_value;
    memcpy(value, &values[which - 4], sizeof values[0]);
    return success;
}

// Copies and fills.
API cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* stream) {
    IN_CONTEXT;
    // The graph would read memory that may be gone by then.
    if (is_captured(stream) && !is_pinned(from, bytes)) return refuse(stream);
    RECORDED(stream, copy_to_device(to, from, bytes, s));
    if (!is_pinned(from, bytes)) USES(stream, to, to);
    return copy_to_device(to, from, bytes, stream);
}
API cuMemcpyHtoD_v2(Address to, const void* from, size_t bytes) {
    IN_CONTEXT;
    NOT_IN_CAPTURE;
    USES(nullptr, to, to);
    const int result = copy_to_device(to, from, bytes, nullptr);
    host_waits();
    return result;
}
API cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) {
    IN_CONTEXT;
    if (is_captured(stream) && !is_pinned(to, bytes)) return refuse(stream);
    RECORDED(stream, copy_to_host(to, from, bytes, s));
    if (!is_pinned(to, bytes)) USES(stream, from, from);
    return copy_to_host(to, from, bytes, stream);
}
API cuMemcpyDtoH_v2(void* to, Address from, size_t bytes) {
    IN_CONTEXT;
    NOT_IN_CAPTURE;
    USES(nullptr, from, from);
    const int result = copy_to_host(to, from, bytes, nullptr);
    host_waits();
    return result;
}
API cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void* stream) {
    IN_CONTEXT;
    RECORDED(stream, (USES(s, to, from), copy_on_device(to, from, bytes)));
    USES(stream, to, from);
    return copy_on_device(to, from, bytes);
}
API cuMemcpyDtoD_v2(Address to, Address from, size_t bytes) {
    IN_CONTEXT;
    NOT_IN_CAPTURE;
    USES(nullptr, to, from);
    return copy_on_device(to, from, bytes);
}
API cuMemcpyPeerAsync(Address to, void*, Address from, void*, size_t bytes, void* stream) {
    IN_CONTEXT;
    RECORDED(stream, (USES(s, to, from), copy_on_device(to, from, bytes)));
    USES(stream, to, from);
    return copy_on_device(to, from, bytes);
}
API cuMemsetD8Async(Address to, unsigned char value, size_t count, void* stream) {
    IN_CONTEXT;
    RECORDED(stream, (USES(s, to, to), fill(to, &value, 1, count)));
    USES(stream, to, to);
    return fill(to, &value, 1, count);
}
API cuMemsetD16Async(Address to, unsigned short value, size_t count, void* stream) {
    IN_CONTEXT;
    RECORDED(stream, (USES(s, to, to), fill(to, &value, 2, count)));
    USES(stream, to, to);
    return fill(to, &value, 2, count);
}
API cuMemsetD32Async(Address to, unsigned value, size_t count, void* stream) {
    IN_CONTEXT;
    RECORDED(stream, (USES(s, to, to), fill(to, &value, 4, count)));
    USES(stream, to, to);
    return fill(to, &value, 4, count);
}
API cuMemAllocHost_v2(void** memory, size_t bytes) {
    IN_CONTEXT;
    NOT_IN_CAPTURE;
    return allocate_pinned(memory, bytes);
}
API cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    IN_CONTEXT;
    NOT_IN_CAPTURE;
    return allocate_pinned(memory, bytes);
}
API cuMemFreeHost(void* memory) {
    IN_CONTEXT;
    NOT_IN_CAPTURE;
    return release_pinned(memory);
}
API cuMemHostRegister_v2(void* memory, size_t bytes, unsigned) {
    IN_CONTEXT;
    return register_pinned(memory, bytes);
}
API cuMemHostUnregister(void* memory) {
    IN_CONTEXT;
    return unregister_pinned(memory);
}

// Streams. Events are in events.cpp.
API cuStreamCreate(void** stream, unsigned) {
    IN_CONTEXT;
    *stream = create_stream();
    return success;
}
API cuStreamCreateWithPriority(void** stream, unsigned, int) {
    IN_CONTEXT;
    *stream = create_stream();
    return success;
}
API cuStreamDestroy_v2(void* stream) {
    LOCKED;
    destroy_stream(stream);
    return success;
}
API cuStreamSynchronize(void* stream) {
    IN_CONTEXT;
    NOT_CAPTURED(stream);
    host_waits_for(mark(stream));
    host_waited();
    return success;
}
API cuStreamQuery(void* stream) {
    LOCKED;
    NOT_CAPTURED(stream);
    return success;
}

// Modules and launches. Any image will do, because the kernels are those of this library.
API cuModuleLoadData(void** module, const void*) {
    IN_CONTEXT;
    NOT_IN_CAPTURE;
    *module = &the_module;
    return success;
}
API cuModuleLoadDataEx(void** module, const void*, unsigned, int*, void**) {
    IN_CONTEXT;
    NOT_IN_CAPTURE;
    *module = &the_module;
    return success;
}
API cuModuleLoad(void** module, const char*) {
    IN_CONTEXT;
    NOT_IN_CAPTURE;
    *module = &the_module;
    return success;
}
API cuModuleUnload(void*) { return success; }
API cuModuleGetFunction(void** function, void*, const char* name) {
    LOCKED;
    *function = emulator::find_kernel(name);
    if (*function != nullptr) return success;
    fprintf(stderr, "fake GPU: no kernel is called %s: is its file among those of kernels/driver/build?\n", name);
    return not_found;
}
API cuFuncGetParamInfo(void* function, size_t number, size_t* offset, size_t* bytes) {
    const emulator::Kernel& kernel = *static_cast<emulator::Kernel*>(function);
    if (number >= kernel.parameters.size()) return invalid_value;
    if (offset != nullptr) *offset = kernel.parameters[number].offset;
    if (bytes != nullptr) *bytes = kernel.parameters[number].bytes;
    return success;
}
API cuFuncGetName(const char** name, void* function) {
    *name = static_cast<emulator::Kernel*>(function)->name;
    return success;
}
API cuFuncSetAttribute(void* function, int which, int value) {
    LOCKED;
    if (which != 8) return which == 9 ? success : invalid_value; // 9: the wished share of shared memory
    if (value < 0 || static_cast<size_t>(value) > shared_bytes_a_block()) return invalid_value;
    static_cast<emulator::Kernel*>(function)->dynamic_bytes_max = static_cast<size_t>(value);
    return success;
}
API cuFuncGetAttribute(int* value, int which, void* function) {
    const emulator::Kernel& kernel = *static_cast<emulator::Kernel*>(function);
    const int ptx_version = 5;
    *value = which == 0 ? 1024 : which == 8 ? static_cast<int>(kernel.dynamic_bytes_max) : which == ptx_version ? virtual_architecture() : 0;
    return success;
}
API cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned size_x, unsigned size_y, unsigned size_z,
                   unsigned dynamic_bytes, void* stream, void** arguments, void**) {
    IN_CONTEXT;
    const Shape shape = {dim3(grid_x, grid_y, grid_z), dim3(size_x, size_y, size_z), dynamic_bytes, false};
    return launch_or_record(function, shape, stream, arguments);
}
API cuLaunchKernelEx(const LaunchConfiguration* configuration, void* function, void** arguments, void**) {
    IN_CONTEXT;
    const LaunchConfiguration& c = *configuration;
    const int programmatic_stream_serialization = 6;
    bool begins_early = false;
    for (unsigned i = 0; i < c.attribute_count; ++i) {
        if (c.attributes[i].which != programmatic_stream_serialization) return not_supported;
        begins_early = c.attributes[i].number != 0;
    }
    // A card that has no such instructions would begin the kernel too early, or refuse; the program must not rely on
    // either.
    if (begins_early && virtual_architecture() < waits_from) die("a kernel may begin early, but its code does not wait");
    const Shape shape = {dim3(c.grid_x, c.grid_y, c.grid_z), dim3(c.size_x, c.size_y, c.size_z), c.dynamic_bytes, begins_early};
    return launch_or_record(function, shape, c.stream, arguments);
}

// A matrix of bf16, which is all that hone's kernels copy by boxes; the rules are those of the driver's documentation.
API cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* base, const uint64_t* sizes, const uint64_t* strides,
                           const unsigned* box, const unsigned* steps, int interleave, int swizzle, int, int fill) {
    IN_CONTEXT;
    const int bf16 = 9, swizzle_64 = 2, swizzle_128 = 3;
    if (type != bf16 || rank != 2 || interleave != 0 || fill != 0 || steps[0] != 1 || steps[1] != 1) return invalid_value;
    if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || reinterpret_cast<uintptr_t>(base) % 16 != 0) return invalid_value;
    const uint64_t limit = uint64_t{1} << 32;
    if (sizes[0] == 0 || sizes[0] > limit || sizes[1] == 0 || sizes[1] > limit) return invalid_value;
    if (strides[0] % 16 != 0 || strides[0] < 2 * sizes[0] || strides[0] >= uint64_t{1} << 40) return invalid_value;
    if (box[0] == 0 || box[0] > 256 || box[1] == 0 || box[1] > 256 || box[0] * 2 % 16 != 0) return invalid_value;
    const unsigned span = swizzle == swizzle_64 ? 64 : swizzle == swizzle_128 ? 128 : 0;
    // Panels are rows of one whole span.
    if (span == 0 || box[0] * 2 != span) return invalid_value;
    const Address first = reinterpret_cast<Address>(base);
    if (!is_allocated(first, strides[0] * (sizes[1] - 1) + 2 * sizes[0])) die("a tensor map reaches beyond its allocation");
    const emulator::TensorMapBits bits = {emulator::tensor_map_mark, first, strides[0], static_cast<uint32_t>(sizes[0]),
                                          static_cast<uint32_t>(sizes[1]), box[0], box[1], span};
    static_assert(sizeof bits <= tensor_map_bytes, "it fits into a map");
    memset(map, 0, tensor_map_bytes);
    memcpy(map, &bits, sizeof bits);
    return success;
}

API cuGetErrorName(int result, const char** name) {
    switch (result) {
        case success: *name = "CUDA_SUCCESS"; break;
        case invalid_value: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case out_of_memory: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case not_initialized: *name = "CUDA_ERROR_NOT_INITIALIZED"; break;
        case no_device: *name = "CUDA_ERROR_NO_DEVICE"; break;
        case invalid_device: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
        case invalid_context: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case invalid_handle: *name = "CUDA_ERROR_INVALID_HANDLE"; break;
        case not_ready: *name = "CUDA_ERROR_NOT_READY"; break;
        case not_found: *name = "CUDA_ERROR_NOT_FOUND"; break;
        case launch_out_of_resources: *name = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"; break;
        case not_supported: *name = "CUDA_ERROR_NOT_SUPPORTED"; break;
        case illegal_state: *name = "CUDA_ERROR_ILLEGAL_STATE"; break;
        case capture_unsupported: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
        case capture_invalidated: *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
        case capture_wrong_thread: *name = "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"; break;
        default: *name = nullptr; return invalid_value;
    }
    return success;
}
API cuGetErrorString(int result, const char** text) { return cuGetErrorName(result, text); }
