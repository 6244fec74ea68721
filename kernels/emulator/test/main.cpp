// Tests the emulator with kernels whose faults are known. Each case runs in a process of its own, in three orders
// of threads.
//
// `run` builds it in three ways: plain, under the address and undefined-behaviour sanitizers, and with the race
// detector. A case says in which of them the fault must be found and with which words; it also says in which it is
// not found.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "emulator/launch.h"
#include "kernels.h"

EMULATED_KERNEL(block_total);
EMULATED_KERNEL(merged);
EMULATED_KERNEL(neighbours);
EMULATED_KERNEL(divergent);
EMULATED_KERNEL(partial_shuffle);
EMULATED_KERNEL(multiply);
EMULATED_KERNEL(transpose);
EMULATED_KERNEL(blocks);
EMULATED_KERNEL(dynamic);
EMULATED_KERNEL(early);
EMULATED_KERNEL(ahead);
EMULATED_KERNEL(unaligned);
EMULATED_KERNEL(boxes_64);
EMULATED_KERNEL(boxes_32);

namespace {

enum Build { plain = 1, sanitized = 2, races = 4, any = 7 };
#if defined(__SANITIZE_ADDRESS__)
const Build build = sanitized;
#elif defined(EMULATOR_RACES)
const Build build = races;
#else
const Build build = plain;
#endif

int failures;

// Memory that the race detector treats as the device's.
alignas(16) float global[8];

// Whether the next launches begin early.
bool begins_early = false;

template <class... Arguments>
emulator::Refusal launch(const char* name, unsigned grid, unsigned threads, size_t dynamic_bytes, int order, Arguments... arguments) {
    void* pointers[] = {&arguments...};
    return emulator::launch(*emulator::find_kernel(name), dim3(grid), dim3(threads), dynamic_bytes, pointers, emulator::Limits(), order, 2,
                            begins_early);
}

// The end of the process, and its standard error.
struct Outcome {
    bool passed;
    std::string text;
};

Outcome run(const std::function<bool()>& body) {
    int ends[2];
    if (pipe(ends) != 0) abort();
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        _exit(body() ? 0 : 1);
    }
    close(ends[1]);
    Outcome outcome = {false, ""};
    char bytes[4096];
    for (ssize_t n; (n = read(ends[0], bytes, sizeof bytes)) > 0;) outcome.text.append(bytes, static_cast<size_t>(n));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    outcome.passed = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    return outcome;
}

// `body` gets the order of threads and returns whether its result is right.
void right(const char* name, const std::function<bool(int)>& body) {
    for (int order = 0; order < 3; ++order) {
        const Outcome outcome = run([&] { return body(order); });
        if (outcome.passed) continue;
        ++failures;
        printf("FAILED: %s, order %d: expected a right result\n%s", name, order, outcome.text.c_str());
    }
}

// The fault must be seen in at least one of the orders, with `words` if there are any.
void faulty(const char* name, int builds, const char* words, const std::function<bool(int)>& body) {
    if ((builds & build) == 0) return;
    std::string seen;
    for (int order = 0; order < 3; ++order) {
        const Outcome outcome = run([&] { return body(order); });
        if (!outcome.passed && outcome.text.find(words) != std::string::npos) return;
        seen += outcome.text;
    }
    ++failures;
    printf("FAILED: %s: expected \"%s\" in one order of three\n%s", name, words, seen.c_str());
}

bool total(int order, int barriers) {
    std::vector<float> x(256, 1.f), y(2, 0.f);
    launch("block_total", 1, 256, 0, order, (const float*)x.data(), y.data(), barriers);
    return y[0] == 256.f && y[1] == 256.f;
}

// Whether sums and maxima are those of shuffles, to the last bit, in whole warps and one that is not whole.
bool merges(int order) {
    std::vector<float> x(96);
    for (int i = 0; i < 96; ++i) x[i] = sinf(1.7f * i) * powf(10.f, (float)(i % 9 - 4));
    for (unsigned threads : {96u, 75u}) {
        std::vector<unsigned> different(threads, 1);
        launch("merged", 1, threads, 0, order, (const float*)x.data(), different.data());
        for (unsigned i = 0; i < threads; ++i) {
            if (different[i] != 0) return false;
        }
    }
    return true;
}

bool trade(int order, int synchronize) {
    std::vector<float> x(128);
    for (int i = 0; i < 128; ++i) x[i] = (float)i;
    launch("neighbours", 1, 128, 0, order, x.data(), synchronize);
    for (int i = 0; i < 128; ++i) {
        if (x[i] != (float)(i ^ 1)) return false;
    }
    return true;
}

bool diverge(int order, int fault) { return launch("divergent", 1, 64, 0, order, fault) == emulator::Refusal::none; }

bool product(int order, int fault) {
    std::vector<bf16> a(256), b(128);
    std::vector<float> c(128, 0.f);
    for (int i = 0; i < 256; ++i) a[i] = bf16(i * 7 % 13 - 6);
    for (int i = 0; i < 128; ++i) b[i] = bf16(i * 5 % 11 - 5);
    launch("multiply", 1, 32, 768, order, (const bf16*)a.data(), (const bf16*)b.data(), c.data(), fault);
    for (int i = 0; i < 128; ++i) {
        float sum = 0.f;
        for (int k = 0; k < 16; ++k) sum += float(a[i / 8 * 16 + k]) * float(b[k * 8 + i % 8]);
        if (c[i] != sum) return false;
    }
    return true;
}

bool transposed(int order, int beyond) {
    bf16 *x = new bf16[64], *y = new bf16[64];
    for (int i = 0; i < 64; ++i) x[i] = bf16(i);
    launch("transpose", 1, 32, 0, order, (const bf16*)x, y, beyond);
    for (int i = 0; i < 64; ++i) {
        if (float(y[i]) != (float)(i % 8 * 8 + i / 8)) return false;
    }
    return true;
}

// Whether two products of boxes are right, for panels of 64 and of 32 columns.
bool boxes(int order, int columns, int across, int fault) {
    std::vector<bf16> x(static_cast<size_t>(256) * columns);
    for (size_t i = 0; i < x.size(); ++i) x[i] = bf16(static_cast<float>(static_cast<int>(i * 7 % 23) - 11));
    const auto at = [&](int row, int column) { return float(x[static_cast<size_t>(row) * columns + column]); };
    const emulator::TensorMapBits bits = {emulator::tensor_map_mark, reinterpret_cast<uint64_t>(x.data()), 2u * columns,
                                          static_cast<uint32_t>(columns), 256, static_cast<uint32_t>(columns), 64, 2u * columns};
    TensorMap map = {};
    memcpy(map.bytes, &bits, sizeof bits);
    std::vector<float> c(64 * 64, 0.f);
    launch(columns == 64 ? "boxes_64" : "boxes_32", 1, 160, 1024 + 128 * 2 * columns, order, map, c.data(), across, fault);
    for (int i = 0; i < 64; ++i)
        for (int j = 0; j < 64; ++j) {
            float sum = 0.f;
            for (int row = 0; row < 256; row += 128)
                for (int k = 0; k < 16; ++k) {
                    const float b = across ? at(row + 64 + 16 * (j / columns) + k, j % columns) : at(row + 64 + j, k);
                    sum += at(row + i, k) * b;
                }
            if (c[i * 64 + j] != sum) return false;
        }
    return true;
}

// A process has one case, so what it sets is not set back.
bool early(int order, int fault) {
    begins_early = true;
    launch("early", 2, 64, 16, order, global, fault);
    return global[0] == 2.f && global[7] == 2.f;
}

bool ahead(int order, int bytes) {
    begins_early = true;
    launch("ahead", 1, 64, 0, order, global, bytes);
    return global[0] == 2.f && global[7] == 2.f;
}

bool aligned(int order, int offset) {
    alignas(16) static unsigned char x[600];
    std::vector<uint4> y(32);
    launch("unaligned", 1, 32, 0, order, (const unsigned char*)x, y.data(), offset);
    return true;
}

}  // namespace

int main() {
    emulator::is_global = [](uint64_t address) { return address - reinterpret_cast<uint64_t>(global) < sizeof global; };

    right("a sum over a block", [](int order) { return total(order, 3); });
    faulty("a sum without its first barrier", races, "a race", [](int order) { return total(order, 2); });
    faulty("a sum without its second barrier", any, "", [](int order) { return total(order, 1); });
    faulty("a sum without its second barrier", races, "kernels.h:", [](int order) { return total(order, 1); });
    right("sums of a warp in one step", merges);
    right("a trade between neighbours", [](int order) { return trade(order, 1); });
    faulty("a trade without __syncwarp", any, "", [](int order) { return trade(order, 0); });

    right("a barrier that all reach", [](int order) { return diverge(order, 0); });
    faulty("a barrier behind a return", any, "barrier", [](int order) { return diverge(order, 1); });
    faulty("two barriers", any, "two barriers", [](int order) { return diverge(order, 2); });
    faulty("half a warp in a shuffle of all", any, "__shfl_xor_sync of lanes ffffffff", [](int order) {
        std::vector<float> x(32, 1.f);
        return launch("partial_shuffle", 1, 32, 0, order, x.data(), 1) == emulator::Refusal::none;
    });

    right("a product of tiles", [](int order) { return product(order, 0); });
    faulty("a copy nobody waited for", any, "", [](int order) { return product(order, 1); });
    faulty("a matrix row off by two bytes", any, "not a multiple of 16", [](int order) { return product(order, 2); });
    faulty("a matrix row in global memory", any, "not in the block's shared memory", [](int order) { return product(order, 3); });
    right("a transposed matrix", [](int order) { return transposed(order, 0); });
    faulty("a write beyond an array", sanitized, "heap-buffer-overflow", [](int order) { return transposed(order, 1); });

    right("blocks with places of their own", [](int order) {
        return launch("blocks", 8, 32, 0, order, global, 0) == emulator::Refusal::none;
    });
    faulty("blocks that write one place", races, "a race", [](int order) {
        return launch("blocks", 8, 32, 0, order, global, 1) == emulator::Refusal::none;
    });

    right("a load of 16 bytes", [](int order) { return aligned(order, 0); });
    faulty("a load of 16 bytes off by four", sanitized, "misaligned", [](int order) { return aligned(order, 4); });

    right("launches within and beyond the limits", [](int order) {
        std::vector<float> x(1024);
        emulator::Kernel& kernel = *emulator::find_kernel("dynamic");
        if (launch("dynamic", 1, 1024, 48 << 10, order, x.data()) != emulator::Refusal::none) return false;
        if (launch("dynamic", 1, 1024, (48 << 10) + 1, order, x.data()) != emulator::Refusal::invalid_value) return false;
        kernel.dynamic_bytes_max = 227 << 10;
        if (launch("dynamic", 1, 1024, 227 << 10, order, x.data()) != emulator::Refusal::none) return false;
        return launch("dynamic", 1, 2048, 0, order, x.data()) == emulator::Refusal::invalid_value;
    });
    faulty("a null pointer", plain | races, "kernel blocks, block (0, 0, 0), thread (0, 0, 0): access to", [](int order) {
        return launch("blocks", 1, 32, 0, order, static_cast<float*>(nullptr), 1) == emulator::Refusal::none;
    });
    faulty("shared memory shorter than its use", sanitized, "heap-buffer-overflow", [](int order) {
        std::vector<float> x(1024);
        return launch("dynamic", 1, 1024, 1024, order, x.data()) == emulator::Refusal::none;
    });

    // Two blocks write to one place, which only the race detector reports.
    if (build != races) right("a kernel that waits first", [](int order) { return early(order, 0); });
    faulty("a thread that returns before the wait", any, "thread (7, 0, 0): the thread returns before wait_for_earlier_kernels",
           [](int order) { return early(order, 1); });
    faulty("a read before the wait", races, "reads global memory before wait", [](int order) { return early(order, 2); });
    faulty("a write before the wait", races, "writes to global memory before wait", [](int order) { return early(order, 3); });
    faulty("a copy before the wait", any, "copies global memory before wait", [](int order) { return early(order, 4); });
    faulty("an atomic before the wait", any, "changes global memory before wait", [](int order) { return early(order, 5); });
    right("memory that is asked for ahead", [](int order) { return ahead(order, sizeof global); });
    right("no memory ahead", [](int order) { return ahead(order, -4); });
    faulty("memory ahead that is not the device's", any, "are not global memory",
           [](int order) { return ahead(order, sizeof global + 4); });
    faulty("a box before the wait", any, "copies a box of global memory before wait", [](int order) {
        begins_early = true;
        return boxes(order, 64, 0, 0);
    });

    for (int columns : {64, 32}) {
        right("products of boxes, along rows", [&](int order) { return boxes(order, columns, 0, 0); });
        right("products of boxes, across rows", [&](int order) { return boxes(order, columns, 1, 0); });
        faulty("a box from another column", any, "", [&](int order) { return boxes(order, columns, 0, 5); });
        faulty("a descriptor's stride", any, "", [&](int order) { return boxes(order, columns, 0, 11); });
    }
    faulty("a descriptor's swizzle", any, "", [](int order) { return boxes(order, 64, 0, 8); });
    faulty("a descriptor's distance of panels", any, "", [](int order) { return boxes(order, 32, 1, 10); });
    faulty("barriers before they are made", any, "before barriers_are_made", [](int order) { return boxes(order, 64, 0, 1); });
    faulty("a stage that is filled without a wait", any, "an arrival at a barrier", [](int order) { return boxes(order, 64, 0, 2); });
    faulty("a barrier that expects more bytes", any, "has copies of 16384 of 32768 bytes", [](int order) { return boxes(order, 64, 0, 3); });
    right("a wait that gives up", [](int order) { return !boxes(order, 64, 0, 4); });
    faulty("a box between multiples of 128", any, "expected a multiple of 128", [](int order) { return boxes(order, 64, 0, 6); });
    faulty("a box nobody waited for", any, "", [](int order) { return boxes(order, 64, 1, 7); });
    faulty("a product without a fence", any, "since the last wgmma_fence", [](int order) { return boxes(order, 64, 0, 9); });
    faulty("a left operand that changes", any, "changed its part of A", [](int order) { return boxes(order, 64, 1, 12); });
    faulty("a stage that is given back too early", any, "", [](int order) { return boxes(order, 64, 0, 13); });
    faulty("a result that is written too early", any, "wrote a result", [](int order) { return boxes(order, 64, 0, 14); });
    faulty("a product nobody waited for", any, "", [](int order) { return boxes(order, 64, 0, 15); });
    faulty("a product of three warps and one of four", any, "of a warpgroup had", [](int order) { return boxes(order, 64, 0, 16); });
    faulty("a trade without its numbered barrier", races, "a race", [](int order) { return boxes(order, 64, 0, 17); });
    faulty("a numbered barrier of too many", any, "128 of 160 threads are there", [](int order) { return boxes(order, 64, 0, 18); });
    faulty("a write that a product may not see", races, "without fence_proxy_async", [](int order) { return boxes(order, 64, 0, 19); });
    right("a write that a product sees", [](int order) { return boxes(order, 64, 0, 20) || true; });

    printf("emulator: %s\n", failures == 0 ? "every fault found" : "FAILED");
    return failures == 0 ? 0 : 1;
}
