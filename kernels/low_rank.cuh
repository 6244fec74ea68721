// LoRA's matrices beside and below an expanded weight, for kernels/low_rank.cu and kernels/four_bit.cu.
#pragma once
#include "common.cuh"

// A pair of one of the layers side by side. Without a pair, `rank` is 0 and nothing is read.
template <typename T>
struct Pair {
    const T* a;      // [rank, cols]
    const float* b;  // [rows, rank]
    int rows, rank;
    float scale;
};

// Completes W~ [N + spare, cols + spare], whose rows lie `cols + spare` apart, around W [N, cols]. Behind W's columns,
// rows of layer i have scale * B in the columns of its ranks and zeros elsewhere. Below W, the rows of layer i's ranks
// have its A, and the rest is zero. Nobody reads the corner. `block` counts the blocks that do this. The first `spare`
// write a row below W each; a thread of the others writes eight values behind it.
template <typename T>
__device__ __forceinline__ void insert(T* out, int cols, int spare, const Pair<T> (&pairs)[3], int block) {
    const int stride = cols + spare, n = pairs[0].rows + pairs[1].rows + pairs[2].rows;
    if (block < spare) {
        const T* from = nullptr;
        int row = block;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            if (row >= 0 && row < pairs[i].rank) from = pairs[i].a + (uint64_t)row * cols;
            row -= pairs[i].rank;
        }
        T* to = out + (uint64_t)(n + block) * stride;
        for (int i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
            Eight<T> eight = {};
            if (from != nullptr) eight.load(from + i);
            eight.store(to + i);
        }
        return;
    }
    const unsigned item = (block - spare) * blockDim.x + threadIdx.x, groups = spare / 8;
    const int row = item / groups, column = (item - row * groups) * 8;
    if (row >= n) return;
    Eight<T> eight = {};
    int local = row, first = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        if (local >= 0 && local < pairs[i].rows) {
            const float* from = pairs[i].b + (uint64_t)local * pairs[i].rank;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const int at = column + j - first;
                if (at >= 0 && at < pairs[i].rank) eight.v[j] = from[at] * pairs[i].scale;
            }
        }
        local -= pairs[i].rows, first += pairs[i].rank;
    }
    eight.store(out + (uint64_t)row * stride + cols + column);
}

#define PAIR_PARAMETERS(T)                                                                                      \
    const T *a0, const float *b0, int rows0, int rank0, float scale0, const T *a1, const float *b1, int rows1, \
        int rank1, float scale1, const T *a2, const float *b2, int rows2, int rank2, float scale2
#define PAIRS \
    { {a0, b0, rows0, rank0, scale0}, {a1, b1, rows1, rank1, scale1}, {a2, b2, rows2, rank2, scale2} }
