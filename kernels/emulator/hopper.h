// The functions of prim_hopper.cuh for the host: barriers with phases, copies of boxes, products of warpgroups.
//
// Work that is asynchronous on the hardware happens here as late or as early as a program may expect, by the launch's
// order. A copy's bytes arrive at once, or when somebody waits for its barrier. A product reads its operands at once,
// or when it is waited for; its results hold NaN until then. So a missing wait, or a stage that is reused too early,
// gives other results in one of the orders. Each warp computes its own quarter of a product: a warpgroup's warps do not
// wait for each other.
#pragma once
#include "tensor_core.h"

struct alignas(128) TensorMap {
    unsigned char bytes[128];
};

namespace emulator {

void init_phases(uint64_t* at, uint32_t arrivals);
void phases_are_made();
void arrive(uint64_t* at, uint32_t bytes);
void wait_for_phase(uint64_t* at, uint32_t parity, bool patient, const Site* site);
void load_box(void* to, const TensorMap* map, uint64_t* at, int x, int y);
void wait_at_number(int number, int threads, const Site* site);

struct ProductIssue {
    float* d;
    const uint32_t* left;
    uint64_t a, b;
    int columns;
    bool accumulate, across_rows;
};
void issue_product(void* const operands[32]);
void finish_products(void* const operands[32]);

template <int COLUMNS>
void issue(float (&d)[1][COLUMNS][4], const uint32_t* left, uint64_t a, uint64_t b, bool accumulate, bool across_rows, const Site* site) {
    ProductIssue product = {&d[0][0][0], left, a, b, 8 * COLUMNS, accumulate, across_rows};
    collective(0xffffffffu, issue_product, &product, site);
}

}  // namespace emulator

// The address of shared memory: the host's, which serves as well as one of the hardware.
inline uint64_t shared_address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) { emulator::init_phases(barrier, arrivals); }
inline void barriers_are_made() { emulator::phases_are_made(); }
inline void barrier_arrive(uint64_t* barrier) { emulator::arrive(barrier, 0); }
inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) { emulator::arrive(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity, int patience) {
    emulator::wait_for_phase(barrier, parity, patience > 0, EMULATOR_SITE("barrier_wait"));
}
inline void tma_load_2d(void* to, const TensorMap* map, uint64_t* barrier, int x, int y) { emulator::load_box(to, map, barrier, x, y); }
inline void fence_proxy_async() {
    if (emulator::at_proxy_fence != nullptr) emulator::at_proxy_fence();
}
inline void named_barrier(int number, int threads) { emulator::wait_at_number(number, threads, EMULATOR_SITE("named_barrier")); }

template <int registers>
inline void release_registers() {
    static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
}
template <int registers>
inline void take_registers() {
    release_registers<registers>();
}

template <class... Results>
inline void wgmma_fence(Results&...) {
    emulator::thread->fenced = true;
}
inline void wgmma_commit() { ++emulator::thread->product_groups; }
template <int groups, class... Results>
inline void wgmma_wait(Results&...) {
    int left = groups;
    emulator::collective(0xffffffffu, emulator::finish_products, &left, EMULATOR_SITE("wgmma_wait"));
    emulator::thread->fenced = false;
}

template <int COLUMNS>
inline void wgmma_ss(float (&d)[1][COLUMNS][4], uint64_t a, uint64_t b, bool accumulate) {
    emulator::issue(d, nullptr, a, b, accumulate, false, EMULATOR_SITE("wgmma_ss"));
}
template <int COLUMNS>
inline void wgmma_rs(float (&d)[1][COLUMNS][4], const uint32_t (&a)[4], uint64_t b) {
    emulator::issue(d, a, 0, b, true, true, EMULATOR_SITE("wgmma_rs"));
}
