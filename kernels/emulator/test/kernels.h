// Kernels with one fault each, and the same without it: what the emulator must find, and must not.
#pragma once
#include "common.cuh"
#include "prim.cuh"

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

// Sums and maxima of warps, each also written out as the shuffles that the device makes; the last lanes of the block may be
// missing. Counts the bits in which they differ.
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

extern "C" __global__ void unaligned(const unsigned char* x, uint4* y, int offset) {
    y[threadIdx.x] = *reinterpret_cast<const uint4*>(x + 16 * threadIdx.x + offset);
}
