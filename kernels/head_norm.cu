// Root-mean-square norm of groups of columns, in place, one warp per group. The twin of src/ops/head_norm.rs.
//
// A group is one head (64 to 256 columns) or all heads together. Group g of a row begins at column `at + g *
// width`.
#include "common.cuh"

// Whether all groups in rows `stride` apart begin at a multiple of 16 bytes.
__device__ __forceinline__ bool even(int stride, int at, int width) {
    return stride % 8 == 0 && at % 8 == 0 && width % 8 == 0;
}

template <typename T>
__device__ __forceinline__ float reciprocal_rms(const T* x, int width, float eps, bool by_eight) {
    const int lane = threadIdx.x & 31;
    float sum = 0.f;
    if (by_eight) {
        for (int i = lane * 8; i < width; i += 256) {
            Eight<T> a;
            a.load(x + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += a.v[j] * a.v[j];
        }
    } else {
        for (int i = lane; i < width; i += 32) sum += widen(x[i]) * widen(x[i]);
    }
    return 1.f / sqrtf(warp_sum(sum) / (float)width + eps);
}

template <typename T>
__device__ __forceinline__ void forward(T* x, const float* w, int stride, int at, int count, int width, float eps) {
    const int lane = threadIdx.x & 31, group = (int)(blockIdx.y * (blockDim.x >> 5) + (threadIdx.x >> 5));
    if (group >= count) return;  // a whole warp leaves
    x += (uint64_t)blockIdx.x * stride + at + group * width;
    const bool by_eight = even(stride, at, width);
    const float scale = reciprocal_rms(x, width, eps, by_eight);
    if (by_eight) {
        for (int i = lane * 8; i < width; i += 256) {
            Eight<T> a;
            Eight<float> weight;
            a.load(x + i), weight.load(w + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) a.v[j] = a.v[j] * scale * weight.v[j];
            a.store(x + i);
        }
        return;
    }
    for (int i = lane; i < width; i += 32) x[i] = narrow<T>(widen(x[i]) * scale * w[i]);
}

// d = (d*w - n * mean(d*w*n)) * scale, with n = x * scale.
template <typename T>
__device__ __forceinline__ void backward(T* d, const T* x, const float* w, int stride, int x_stride, int at, int count,
                                         int width, float eps) {
    const int lane = threadIdx.x & 31, group = (int)(blockIdx.y * (blockDim.x >> 5) + (threadIdx.x >> 5));
    if (group >= count) return;
    d += (uint64_t)blockIdx.x * stride + at + group * width, x += (uint64_t)blockIdx.x * x_stride + at + group * width;
    const bool by_eight = even(stride, at, width) && x_stride % 8 == 0;
    const float scale = reciprocal_rms(x, width, eps, by_eight);
    float dot = 0.f;
    if (by_eight) {
        for (int i = lane * 8; i < width; i += 256) {
            Eight<T> a, g;
            Eight<float> weight;
            a.load(x + i), g.load(d + i), weight.load(w + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) dot += g.v[j] * weight.v[j] * a.v[j];
        }
    } else {
        for (int i = lane; i < width; i += 32) dot += widen(d[i]) * w[i] * widen(x[i]);
    }
    const float pull = scale * scale * scale * warp_sum(dot) / (float)width;
    if (by_eight) {
        for (int i = lane * 8; i < width; i += 256) {
            Eight<T> a, g;
            Eight<float> weight;
            a.load(x + i), g.load(d + i), weight.load(w + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) g.v[j] = g.v[j] * weight.v[j] * scale - a.v[j] * pull;
            g.store(d + i);
        }
        return;
    }
    for (int i = lane; i < width; i += 32) d[i] = narrow<T>(widen(d[i]) * w[i] * scale - widen(x[i]) * pull);
}

#define FOR(T, type)                                                                                                   \
    extern "C" __global__ void head_norm_forward_##type(T* x, const float* w, int stride, int at, int count,           \
                                                        int width, float eps) {                                        \
        wait_for_earlier_kernels();                                                                                    \
        forward<T>(x, w, stride, at, count, width, eps);                                                               \
    }                                                                                                                  \
    extern "C" __global__ void head_norm_backward_##type(T* d, const T* x, const float* w, int stride, int x_stride,   \
                                                         int at, int count, int width, float eps) {                    \
        wait_for_earlier_kernels();                                                                                    \
        backward<T>(d, x, w, stride, x_stride, at, count, width, eps);                                                 \
    }
FOR(float, f32)
FOR(bf16, bf16)
