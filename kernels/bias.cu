// The bias of a linear layer, written or added to a range of columns, one block per row. The twin of
// src/ops/bias.rs.
#include "common.cuh"

template <typename T>
__device__ __forceinline__ void apply(const float* bias, T* y, int n, int width, int at, int add) {
    y += (uint64_t)blockIdx.x * width + at;
    if (n % 8 == 0 && width % 8 == 0 && at % 8 == 0) {
        for (int i = threadIdx.x * 8; i < n; i += blockDim.x * 8) {
            Eight<float> b;
            b.load(bias + i);
            if (add) {
                Eight<T> a;
                a.load(y + i);
#pragma unroll
                for (int j = 0; j < 8; ++j) b.v[j] += a.v[j];
            }
            Eight<T> to;
#pragma unroll
            for (int j = 0; j < 8; ++j) to.v[j] = b.v[j];
            to.store(y + i);
        }
        return;
    }
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = narrow<T>((add ? widen(y[i]) : 0.f) + bias[i]);
}

#define FOR(T, type)                                                                                                   \
    extern "C" __global__ void bias_apply_##type(const float* bias, T* y, int n, int width, int at, int add) {         \
        apply<T>(bias, y, n, width, at, add);                                                                          \
    }
FOR(float, f32)
FOR(bf16, bf16)
