// Trained rows of the embedding and of the output head among the frozen ones. The twin of src/ops/tokens.rs. Nothing
// here may count on an address that is a multiple of 16 bytes: few rows are moved.
#include "common.cuh"

// to[places[2 i]] (+)= factor * rows[places[2 i + 1]], one block per place.
template <typename T>
__device__ __forceinline__ void place(const T* rows, const unsigned* places, T* to, int width, float factor, int add) {
    to += (uint64_t)places[2 * blockIdx.x] * width;
    rows += (uint64_t)places[2 * blockIdx.x + 1] * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float value = factor * widen(rows[i]);
        to[i] = narrow<T>(add ? widen(to[i]) + value : value);
    }
}

// to[token] += factor * (sum of d[row] over the places of that token, which follow each other), one block per token.
template <typename T>
__device__ __forceinline__ void collect(const T* d, const unsigned* places, const unsigned* starts, float* to,
                                        int width, int stride, float factor) {
    const unsigned from = starts[blockIdx.x], until = starts[blockIdx.x + 1];
    to += (uint64_t)places[2 * from + 1] * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = 0.f;
        for (unsigned at = from; at < until; ++at) sum += widen(d[(uint64_t)places[2 * at] * stride + i]);
        to[i] += factor * sum;
    }
}

// logits[row, ids[i]] (+)= values[row, i], one block per row.
template <typename T>
__device__ __forceinline__ void put(const T* values, const unsigned* ids, T* logits, int count, int width, int add) {
    values += (uint64_t)blockIdx.x * count;
    logits += (uint64_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < count; i += blockDim.x)
        logits[ids[i]] = add ? narrow<T>(widen(logits[ids[i]]) + widen(values[i])) : values[i];
}

// values[row, i] = logits[row, ids[i]], which becomes 0, one block per row.
template <typename T>
__device__ __forceinline__ void take(T* logits, const unsigned* ids, T* values, int count, int width) {
    values += (uint64_t)blockIdx.x * count;
    logits += (uint64_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        values[i] = logits[ids[i]];
        logits[ids[i]] = narrow<T>(0.f);
    }
}

#define FOR(T, type)                                                                                                   \
    extern "C" __global__ void tokens_place_##type(const T* rows, const unsigned* places, T* to, int width,            \
                                                   float factor, int add) {                                            \
        wait_for_earlier_kernels();                                                                                    \
        place<T>(rows, places, to, width, factor, add);                                                                \
    }                                                                                                                  \
    extern "C" __global__ void tokens_collect_##type(const T* d, const unsigned* places, const unsigned* starts,       \
                                                     float* to, int width, int stride, float factor) {                 \
        wait_for_earlier_kernels();                                                                                    \
        collect<T>(d, places, starts, to, width, stride, factor);                                                      \
    }                                                                                                                  \
    extern "C" __global__ void tokens_put_##type(const T* values, const unsigned* ids, T* logits, int count,           \
                                                 int width, int add) {                                                 \
        wait_for_earlier_kernels();                                                                                    \
        put<T>(values, ids, logits, count, width, add);                                                                \
    }                                                                                                                  \
    extern "C" __global__ void tokens_take_##type(T* logits, const unsigned* ids, T* values, int count, int width) {   \
        wait_for_earlier_kernels();                                                                                    \
        take<T>(logits, ids, values, count, width);                                                                    \
    }
FOR(float, f32)
FOR(bf16, bf16)
