// The bias of a linear layer, written to a range of columns or added to those of another matrix, one block per row.
// The twin of src/ops/bias.rs.
#include "common.cuh"

// Adds the bias to the columns of `from`, if there is one: y itself, or a matrix of its shape.
template <typename T>
__device__ __forceinline__ void apply(const float* bias, const T* from, T* y, int n, int width, int at) {
    const uint64_t row = (uint64_t)blockIdx.x * width + at;
    y += row;
    if (from) from += row;
    if (n % 8 == 0 && width % 8 == 0 && at % 8 == 0) {
        for (int i = threadIdx.x * 8; i < n; i += blockDim.x * 8) {
            Eight<float> b;
            b.load(bias + i);
            if (from) {
                Eight<T> a;
                a.load(from + i);
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
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = narrow<T>((from ? widen(from[i]) : 0.f) + bias[i]);
}

#define FOR(T, type)                                                                                                \
    extern "C" __global__ void bias_apply_##type(const float* bias, const T* from, T* y, int n, int width, int at) { \
        wait_for_earlier_kernels();                                                                                  \
        apply<T>(bias, from, y, n, width, at);                                                                      \
    }
FOR(float, f32)
FOR(bf16, bf16)
