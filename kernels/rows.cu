// Rows copied out of and into a matrix, sums of matrices, and a change of storage type. The twin of
// src/ops/rows.rs.
#include "common.cuh"

// The padding of a list of indices: it stands for no row.
const uint32_t NO_ROW = 0xffffffffu;

// Copies a row of one matrix of `width` columns to a row of another. `aligned`: both begin at multiples of 16
// bytes.
template <typename T>
__device__ __forceinline__ void move(const T* from, T* to, int width, bool aligned = true) {
    if (aligned && width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a;
            a.load(from + i);
            a.store(to + i);
        }
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

template <typename T>
__device__ __forceinline__ void add(T* x, const T* y, unsigned long long n) {
    const unsigned long long i = ((unsigned long long)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i + 8 <= n) {
        Eight<T> a, b;
        a.load(x + i), b.load(y + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) a.v[j] += b.v[j];
        a.store(x + i);
        return;
    }
    for (unsigned long long j = i; j < n; ++j) x[j] = narrow<T>(widen(x[j]) + widen(y[j]));
}

template <typename From, typename To>
__device__ __forceinline__ void convert(const From* x, To* y, unsigned long long n) {
    const unsigned long long i = ((unsigned long long)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i + 8 <= n) {
        Eight<From> a;
        Eight<To> b;
        a.load(x + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) b.v[j] = a.v[j];
        b.store(y + i);
        return;
    }
    for (unsigned long long j = i; j < n; ++j) y[j] = narrow<To>(widen(x[j]));
}

#define FOR(T, type)                                                                                                \
    extern "C" __global__ void rows_columns_##type(const T* x, T* y, int x_stride, int y_stride, int width,         \
                                                   int aligned) {                                                   \
        wait_for_earlier_kernels();                                                                                 \
        move<T>(x + (uint64_t)blockIdx.x * x_stride, y + (uint64_t)blockIdx.x * y_stride, width, aligned != 0);     \
    }                                                                                                               \
    extern "C" __global__ void rows_gather_##type(const T* x, const uint32_t* index, T* y, int width, int stride) { \
        wait_for_earlier_kernels();                                                                                 \
        /* A place without a row takes any: nothing is made of it. */                                                \
        const uint32_t row = index[blockIdx.x] == NO_ROW ? 0 : index[blockIdx.x];                                    \
        move<T>(x + (uint64_t)row * width, y + (uint64_t)blockIdx.x * stride, width, stride % 8 == 0);               \
    }                                                                                                               \
    extern "C" __global__ void rows_scatter_##type(const T* y, const uint32_t* index, T* x, int width,              \
                                                   int stride) {                                                    \
        wait_for_earlier_kernels();                                                                                 \
        if (index[blockIdx.x] == NO_ROW) return;                                                                     \
        move<T>(y + (uint64_t)blockIdx.x * width, x + (uint64_t)index[blockIdx.x] * stride, width, stride % 8 == 0); \
    }                                                                                                               \
    extern "C" __global__ void rows_add_##type(T* x, const T* y, unsigned long long n) {                        \
        wait_for_earlier_kernels();                                                                                 \
        add<T>(x, y, n);                                                                                            \
    }
FOR(float, f32)
FOR(bf16, bf16)

extern "C" __global__ void rows_convert_bf16_f32(const bf16* x, float* y, unsigned long long n) {
    wait_for_earlier_kernels();
    convert(x, y, n);
}
extern "C" __global__ void rows_convert_f32_bf16(const float* x, bf16* y, unsigned long long n) {
    wait_for_earlier_kernels();
    convert(x, y, n);
}
