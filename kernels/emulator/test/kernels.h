// Kernels with one fault each, which the emulator must find, and the same kernels without it.
#pragma once
#include "common.cuh"
#include "prim_hopper.cuh"

// The sum of one block's values. `barriers` says which of the two barriers are there.
extern "C" __global__ void block_total(const float* x, float* y, int barriers) {
    SHARED_ARRAY(float, parts, 32);
    for (int round = 0; round < 2; ++round) {
        const float sum = warp_sum(x[threadIdx.x]);
        if (barriers & 1) __syncthreads();
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
        if (barriers & 2) __syncthreads();
        const float total = warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.f);
        if (threadIdx.x == 0) y[round] = total;
    }
}

// Sums and maxima of warps, each also written out as the shuffles that the device makes; the last lanes of the block
// may be missing. Counts the bits in which they differ.
extern "C" __global__ void merged(const float* x, unsigned* different) {
    float sum = x[threadIdx.x], largest = sum;
    for (int offset = 16; offset > 0; offset >>= 1) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    }
    const unsigned bits = __float_as_uint(sum) ^ __float_as_uint(warp_sum(x[threadIdx.x]));
    different[threadIdx.x] = __popc(bits | (__float_as_uint(largest) ^ __float_as_uint(warp_max(x[threadIdx.x]))));
}

// Neighbours exchange values through shared memory, inside their warp.
extern "C" __global__ void neighbours(float* x, int synchronize) {
    SHARED_ARRAY(float, values, 128);
    values[threadIdx.x] = x[threadIdx.x];
    if (synchronize) __syncwarp();
    x[threadIdx.x] = values[threadIdx.x ^ 1];
}

// Only some threads reach the barrier, or there are two barriers.
extern "C" __global__ void divergent(int fault) {
    if (fault == 1 && threadIdx.x < 32) return;
    if (fault == 2 && threadIdx.x >= 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

extern "C" __global__ void partial_shuffle(float* x, int fault) {
    float value = x[threadIdx.x];
    if (fault == 0 || threadIdx.x < 16) value = __shfl_xor_sync(0xffffffffu, value, 1);
    else __syncthreads();
    x[threadIdx.x] = value;
}

// A product of 16 x 16 and 16 x 8, through the asynchronous copy and matrix loads.
extern "C" __global__ void multiply(const bf16* a, const bf16* b, float* c, int fault) {
    SHARED_DYN(bf16, tile);
    bf16* other = tile + 256;
    const int lane = threadIdx.x, g = lane / 4, t = 2 * (lane % 4);
    cp_async_16(tile + lane * 8, a + lane * 8);
    if (lane < 16) cp_async_16_or_zero(other + lane * 8, b + lane * 8, true);
    cp_async_commit();
    if (fault != 1) cp_async_wait<0>();
    __syncwarp();
    uint32_t left[4], right[2];
    ldmatrix_x4(left, tile + lane % 16 * 16 + lane / 16 * 8 + (fault == 2 ? 1 : 0));
    ldmatrix_x2_trans(right, fault == 3 ? b : other + lane % 16 * 8);
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    mma_m16n8k16(d, left, right);
    for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + t + i % 2] = d[i];
}

// movmatrix and ldmatrix.trans give the same result. The first row goes out of bounds by `beyond` elements.
extern "C" __global__ void transpose(const bf16* x, bf16* y, int beyond) {
    SHARED_ARRAY(bf16, tile, 64);
    const int lane = threadIdx.x, g = lane / 4, t = 2 * (lane % 4);
    tile[2 * lane] = x[2 * lane];
    tile[2 * lane + 1] = x[2 * lane + 1];
    __syncwarp();
    uint32_t pair[1], same[1];
    ldmatrix_x1_trans(pair, tile + lane % 8 * 8);
    ldmatrix_x1(same, tile + lane % 8 * 8);
    if (movmatrix_trans(same[0]) != pair[0]) __trap();
    reinterpret_cast<uint32_t*>(y)[g * 4 + t / 2] = pair[0];
    if (lane == 0) y[63 + beyond] = y[63];
}

// Every block writes to the same place, or to its own.
extern "C" __global__ void blocks(float* x, int fault) {
    if (threadIdx.x == 0) x[fault ? 0 : blockIdx.x] = (float)blockIdx.x;
}

extern "C" __global__ void dynamic(float* x) {
    SHARED_DYN(float, values);
    values[threadIdx.x] = 1.f;
    __syncthreads();
    x[threadIdx.x] = values[threadIdx.x ^ 1];
}

// A kernel that begins early, and uses global memory, returns or copies before it has waited.
extern "C" __global__ void early(float* x, int fault) {
    SHARED_DYN(float, values);
    float before = 0.f;
    if (fault == 1 && threadIdx.x == 7) return;
    if (fault == 2) before = *static_cast<volatile float*>(x + threadIdx.x % 8);
    if (fault == 3 && threadIdx.x == 0) *static_cast<volatile float*>(x) = 1.f;
    if (fault == 4 && threadIdx.x == 0) cp_async_16(values, x), cp_async_commit(), cp_async_wait<0>();
    if (fault == 5 && threadIdx.x == 0) atomicAdd(x, 1.f);
    wait_for_earlier_kernels();
    if (threadIdx.x < 8) x[threadIdx.x] = 2.f + 0.f * before;
}

// A kernel that asks for memory ahead: the device's, or more than that.
extern "C" __global__ void ahead(float* x, int bytes) {
    read_ahead_and_wait(x, bytes);
    if (threadIdx.x < 8) x[threadIdx.x] = 2.f;
}

extern "C" __global__ void unaligned(const unsigned char* x, uint4* y, int offset) {
    y[threadIdx.x] = *reinterpret_cast<const uint4*>(x + 16 * threadIdx.x + offset);
}

// A product of 64 x 16 and 16 x 64 by a warpgroup, with both operands from boxes of one matrix [256][32 or 64], whose
// rows lie along the contraction or, for the right operand of `across`, across it. A fifth warp copies. Two products
// are added.
template <int COLUMNS>
__device__ void multiply_boxes(const TensorMap& map, float* c, int across, int fault) {
    SHARED_DYN(unsigned char, unaligned);
    SHARED_ARRAY(uint64_t, barriers, 2);
    SHARED_ARRAY(float, scratch, 128);
    const Swizzle swizzle = COLUMNS == 64 ? SWIZZLE_128 : SWIZZLE_64;
    const int row_bytes = 2 * COLUMNS;
    unsigned char *const left = aligned_to_panels(unaligned), *const right = left + 64 * row_bytes;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        barrier_init(barriers, 1);
        barrier_init(barriers + 1, 4);
        if (fault != 1) barriers_are_made();
    }
    __syncthreads();
    if (warp == 4) {
        if (lane != 0) return;
        for (int turn = 0; turn < 2; ++turn) {
            if (fault != 2 || turn == 0) barrier_wait(barriers + 1, turn ^ 1, fault == 4 ? 9 : 0);
            barrier_arrive_expecting(barriers, 128 * row_bytes * (fault == 3 || fault == 4 ? 2 : 1));
            tma_load_2d(left, &map, barriers, fault == 5 ? 16 : 0, 128 * turn);
            tma_load_2d(right + (fault == 6 ? 64 : 0), &map, barriers, 0, 128 * turn + 64);
        }
        return;
    }
    float d[1][8][4] = {};
    uint32_t a[4] = {};
    for (int turn = 0; turn < 2; ++turn) {
        if (fault != 7) barrier_wait(barriers, turn, fault == 4 ? 9 : 0);
        const uint64_t rows = matrix_descriptor(left, 16, 8 * row_bytes, fault == 8 ? SWIZZLE_64 : swizzle);
        if (across) {
            // A as fragments, read from its swizzled places.
            for (int e = 0; e < 4; ++e) {
                const int row = warp * 16 + lane / 4 + e % 2 * 8, column = lane % 4 * 2 + e / 2 * 8;
                const uint64_t place = shared_address(left) + row * row_bytes + 2 * column;
                a[e] = *reinterpret_cast<const uint32_t*>(place ^ (place >> 7 & (COLUMNS == 64 ? 7 : 3)) << 4);
            }
        }
        if (fault != 9) wgmma_fence(d);
        if (across) wgmma_rs(d, a, matrix_descriptor(right, fault == 10 ? 0 : 16 * row_bytes, 8 * row_bytes, swizzle));
        else wgmma_ss(d, rows, matrix_descriptor(right, 16, (fault == 11 ? 4 : 8) * row_bytes, swizzle), true);
        wgmma_commit();
        if (fault == 12) a[0] = 0;
        if (fault == 13) {
            if (lane == 0) barrier_arrive(barriers + 1);
            __syncwarp();
        }
        if (fault == 14) d[0][0][0] = 1.f;
        if (fault != 15) wgmma_wait<0>(d);
        if (fault == 16 && warp == 3) wgmma_fence(d), wgmma_ss(d, rows, rows, true), wgmma_commit(), wgmma_wait<0>(d);
        __syncwarp();
        if (fault != 13 && lane == 0) barrier_arrive(barriers + 1);
    }
    // Neighbours exchange values through shared memory, in order only by the barrier.
    scratch[threadIdx.x] = d[0][0][0];
    if (fault != 17) named_barrier(1, fault == 18 ? 160 : 128);
    const float other = scratch[threadIdx.x ^ 64];
    if (other != other && fault != 4 && fault != 17) __trap();
    if (fault == 19 || fault == 20) {
        const uint64_t rows = matrix_descriptor(left, 16, 8 * row_bytes, swizzle);
        *reinterpret_cast<float*>(left + 4 * threadIdx.x) = 1.f;
        if (fault == 20) fence_proxy_async();
        named_barrier(2, 128);
        wgmma_fence(d), wgmma_ss(d, rows, rows, true), wgmma_commit(), wgmma_wait<0>(d);
    }
    for (int i = 0; i < 32; ++i) c[(warp * 16 + lane / 4 + i % 4 / 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[0][i / 4][i % 4];
}
extern "C" __global__ void boxes_64(const __grid_constant__ TensorMap map, float* c, int across, int fault) {
    multiply_boxes<64>(map, c, across, fault);
}
extern "C" __global__ void boxes_32(const __grid_constant__ TensorMap map, float* c, int across, int fault) {
    multiply_boxes<32>(map, c, across, fault);
}
