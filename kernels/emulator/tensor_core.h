// The functions of prim.cuh for the host, carried out for the whole warp when its last lane arrives.
//
// They check what the hardware leaves undefined or faults on: all 32 lanes take part, rows and copies are 16-byte
// aligned, and addresses of shared memory belong to the block. Copies happen when they are waited for, so that a
// missing wait reads poison.
#pragma once
#include "emulator.h"

namespace emulator {

inline void check_all_lanes(void* const operands[32], const char* what) {
    for (int i = 0; i < 32; ++i) {
        if (operands[i] == nullptr) die("%s: lane %d does not take part", what, i);
    }
}

inline void check_aligned(const void* address, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) die("%s: %p is not a multiple of 16 bytes", what, address);
}

struct MatrixLoad {
    uint32_t* fragment;
    const void* row;
    int matrices;
    bool transposed;
};

// values[matrix][row][column]
inline void deal(uint16_t values[8][8], bool transposed, int lane, uint32_t* pair) {
    const int g = lane / 4, t = 2 * (lane % 4);
    const uint32_t lower = transposed ? values[t][g] : values[g][t];
    const uint32_t upper = transposed ? values[t + 1][g] : values[g][t + 1];
    *pair = lower | (upper << 16);
}

inline void load_matrices(void* const operands[32]) {
    check_all_lanes(operands, "ldmatrix");
    const MatrixLoad first = *static_cast<MatrixLoad*>(operands[0]);
    for (int matrix = 0; matrix < first.matrices; ++matrix) {
        uint16_t values[8][8];
        for (int j = 0; j < 8; ++j) {
            const void* row = static_cast<MatrixLoad*>(operands[8 * matrix + j])->row;
            check_aligned(row, "ldmatrix");
            if (!is_shared(row, 16)) die("ldmatrix: row %d of matrix %d is not in the block's shared memory", j, matrix);
            memcpy(values[j], row, 16);
        }
        for (int lane = 0; lane < 32; ++lane)
            deal(values, first.transposed, lane, static_cast<MatrixLoad*>(operands[lane])->fragment + matrix);
    }
}

inline void transpose_matrix(void* const operands[32]) {
    check_all_lanes(operands, "movmatrix");
    uint16_t values[8][8];
    for (int lane = 0; lane < 32; ++lane) memcpy(&values[lane / 4][2 * (lane % 4)], operands[lane], 4);
    for (int lane = 0; lane < 32; ++lane) deal(values, true, lane, static_cast<uint32_t*>(operands[lane]));
}

struct Product {
    float* d;
    const uint32_t *a, *b;
};

inline float lower_half(uint32_t pair) { return emulator_bits<float>(pair << 16); }
inline float upper_half(uint32_t pair) { return emulator_bits<float>(pair & 0xffff0000u); }

inline void multiply_m16n8k16(void* const operands[32]) {
    check_all_lanes(operands, "mma");
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const Product& p = *static_cast<Product*>(operands[lane]);
        const int g = lane / 4, t = 2 * (lane % 4);
        for (int i = 0; i < 4; ++i) {
            float* pair = &a[g + 8 * (i % 2)][t + 8 * (i / 2)];
            pair[0] = lower_half(p.a[i]), pair[1] = upper_half(p.a[i]);
        }
        for (int i = 0; i < 2; ++i) b[t + 8 * i][g] = lower_half(p.b[i]), b[t + 8 * i + 1][g] = upper_half(p.b[i]);
        for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][t + i % 2] = p.d[i];
    }
    for (int row = 0; row < 16; ++row) {
        float sums[8] = {};
        for (int k = 0; k < 16; ++k) {
            for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
        }
        for (int column = 0; column < 8; ++column) d[row][column] += sums[column];
    }
    for (int lane = 0; lane < 32; ++lane) {
        const Product& p = *static_cast<Product*>(operands[lane]);
        const int g = lane / 4, t = 2 * (lane % 4);
        for (int i = 0; i < 4; ++i) p.d[i] = d[g + 8 * (i / 2)][t + i % 2];
    }
}

template <int matrices>
void load_fragment(uint32_t (&fragment)[matrices], const void* row, bool transposed, const Site* site) {
    MatrixLoad load = {fragment, row, matrices, transposed};
    collective(0xffffffffu, load_matrices, &load, site);
}

inline void start_copy(void* to, const void* from, bool inside) {
    check_waited("copies global memory");
    check_aligned(to, "cp.async to shared memory");
    check_aligned(from, "cp.async from global memory");
    if (!is_shared(to, 16)) die("cp.async: the destination is not in the block's shared memory");
    thread->copies.push_back({to, from, inside, thread->group});
}

inline void finish_copies(unsigned groups) {
    std::vector<Copy>& copies = thread->copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group + groups < thread->group; ++done) {
        const Copy& copy = copies[done];
        if (copy.inside) *static_cast<uint4*>(copy.to) = *static_cast<const uint4*>(copy.from);
        else *static_cast<uint4*>(copy.to) = make_uint4(0, 0, 0, 0);
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(done));
}

}  // namespace emulator

inline void ldmatrix_x1(uint32_t (&f)[1], const void* row) { emulator::load_fragment(f, row, false, EMULATOR_SITE("ldmatrix")); }
inline void ldmatrix_x2(uint32_t (&f)[2], const void* row) { emulator::load_fragment(f, row, false, EMULATOR_SITE("ldmatrix")); }
inline void ldmatrix_x4(uint32_t (&f)[4], const void* row) { emulator::load_fragment(f, row, false, EMULATOR_SITE("ldmatrix")); }
inline void ldmatrix_x1_trans(uint32_t (&f)[1], const void* row) { emulator::load_fragment(f, row, true, EMULATOR_SITE("ldmatrix")); }
inline void ldmatrix_x2_trans(uint32_t (&f)[2], const void* row) { emulator::load_fragment(f, row, true, EMULATOR_SITE("ldmatrix")); }
inline void ldmatrix_x4_trans(uint32_t (&f)[4], const void* row) { emulator::load_fragment(f, row, true, EMULATOR_SITE("ldmatrix")); }

inline uint32_t movmatrix_trans(uint32_t pair) {
    emulator::collective(0xffffffffu, emulator::transpose_matrix, &pair, EMULATOR_SITE("movmatrix"));
    return pair;
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::Product product = {d, a, b};
    emulator::collective(0xffffffffu, emulator::multiply_m16n8k16, &product, EMULATOR_SITE("mma"));
}
inline uint32_t pack_bf16(float lower, float upper) {
    return emulator_round_to_bfloat16(lower) | (static_cast<uint32_t>(emulator_round_to_bfloat16(upper)) << 16);
}
inline float exp2_approximate(float x) { return exp2f(x); }

inline void cp_async_16(void* shared, const void* global) { emulator::start_copy(shared, global, true); }
inline void cp_async_16_or_zero(void* shared, const void* global, bool inside) { emulator::start_copy(shared, global, inside); }
inline void cp_async_commit() { ++emulator::thread->group; }
template <int groups>
inline void cp_async_wait() {
    emulator::finish_copies(groups);
}
