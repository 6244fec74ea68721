// Rows of a table, rounded to the activations' type and then multiplied by a factor, one block per row. The twin of
// src/ops/embedding.rs.
#include "common.cuh"

template <typename From, typename To>
__device__ __forceinline__ void gather(const From* table, const uint32_t* ids, To* y, int width, float factor) {
    table += (uint64_t)ids[blockIdx.x] * width, y += (uint64_t)blockIdx.x * width;
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<From> a;
            Eight<To> b;
            a.load(table + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) b.v[j] = widen(narrow<To>(a.v[j])) * factor;
            b.store(y + i);
        }
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        y[i] = narrow<To>(widen(narrow<To>(widen(table[i]))) * factor);
}

#define FOR(From, from, To, to)                                                                              \
    extern "C" __global__ void embedding_gather_##from##_##to(const From* table, const uint32_t* ids, To* y, \
                                                              int width, float factor) {                     \
        wait_for_earlier_kernels();                                                                          \
        gather(table, ids, y, width, factor);                                                                \
    }
FOR(float, f32, float, f32)
FOR(float, f32, bf16, bf16)
FOR(bf16, bf16, float, f32)
FOR(bf16, bf16, bf16, bf16)
