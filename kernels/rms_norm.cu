// Root-mean-square norm: y = w * x / sqrt(mean(x^2) + eps), one block per row. The twin of src/ops/rms_norm.rs. Written
// rows lie `stride` apart, a multiple of eight if the width is one. `scales` gets 1 / rms of each row, unless it is
// null. Neighbouring values move 16 bytes at a time if the width is a multiple of eight, as in every real model. The
// kernels `..._rounded` write each row in 8 bits too, with the bits of a separate pass over the stored values
// (kernels/rounded.cuh); their widths are multiples of eight.
#include "rounded.cuh"

template <typename T>
__device__ __forceinline__ float reciprocal_rms(const T* x, int width, float eps) {
    float sum = 0.f;
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a;
            a.load(x + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += a.v[j] * a.v[j];
        }
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) sum += widen(x[i]) * widen(x[i]);
    }
    return 1.f / sqrtf(block_sum(sum) / (float)width + eps);
}

template <typename T, bool ROUNDED = false>
__device__ __forceinline__ void forward(const T* x, const float* w, T* y, float* scales, int width, int stride,
                                        float eps, RoundedRow rounded = {}) {
    const uint64_t row = (uint64_t)blockIdx.x * width;
    y += (uint64_t)blockIdx.x * stride;
    const float scale = reciprocal_rms(x + row, width, eps);
    if (scales != nullptr && threadIdx.x == 0) scales[blockIdx.x] = scale;
    Extent extent;
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a;
            Eight<float> b;
            a.load(x + row + i);
            b.load(w + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) a.v[j] = a.v[j] * scale * b.v[j];
            a.store(y + i);
            if (ROUNDED) extent.take(a.v);
        }
        if (ROUNDED) round_row(y, extent, rounded, width);
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x)
            y[i] = narrow<T>(widen(x[row + i]) * scale * w[i]);
    }
}

// dx += scale * (dy*w - x * scale^2 * mean(dy*w*x)), scale = 1 / rms.
template <typename T, bool ROUNDED = false>
__device__ __forceinline__ void backward(const T* dy, const T* x, const float* w, T* dx, int width, int stride,
                                         float eps, RoundedRow rounded = {}) {
    const uint64_t row = (uint64_t)blockIdx.x * width;
    dx += (uint64_t)blockIdx.x * stride;
    const float scale = reciprocal_rms(x + row, width, eps);
    float dot = 0.f;
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a, d;
            Eight<float> b;
            a.load(x + row + i);
            d.load(dy + row + i);
            b.load(w + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) dot += d.v[j] * b.v[j] * a.v[j];
        }
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) dot += widen(dy[row + i]) * w[i] * widen(x[row + i]);
    }
    const float pull = scale * scale * scale * block_sum(dot) / (float)width;
    Extent extent;
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a, d, to;
            Eight<float> b;
            a.load(x + row + i);
            d.load(dy + row + i);
            b.load(w + i);
            to.load(dx + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) to.v[j] += d.v[j] * b.v[j] * scale - a.v[j] * pull;
            to.store(dx + i);
            if (ROUNDED) extent.take(to.v);
        }
        if (ROUNDED) round_row(dx, extent, rounded, width);
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            const float grown = widen(dy[row + i]) * w[i] * scale - widen(x[row + i]) * pull;
            dx[i] = narrow<T>(widen(dx[i]) + grown);
        }
    }
}

#define FOR(T, type)                                                                                                   \
    extern "C" __global__ void rms_norm_forward_##type(const T* x, const float* w, T* y, float* scales, int width,     \
                                                       int stride, float eps) {                                        \
        wait_for_earlier_kernels();                                                                                    \
        forward<T>(x, w, y, scales, width, stride, eps);                                                               \
    }                                                                                                                  \
    extern "C" __global__ void rms_norm_backward_##type(const T* dy, const T* x, const float* w, T* dx, int width,     \
                                                        int stride, float eps) {                                       \
        wait_for_earlier_kernels();                                                                                    \
        backward<T>(dy, x, w, dx, width, stride, eps);                                                                 \
    }
FOR(float, f32)
FOR(bf16, bf16)

extern "C" __global__ void rms_norm_forward_rounded_bf16(const bf16* x, const float* w, bf16* y, float* scales,
                                                         fp8* codes, float* code_scales, int width, int stride,
                                                         float eps) {
    wait_for_earlier_kernels();
    const RoundedRow rounded = {codes + (uint64_t)blockIdx.x * width, code_scales + blockIdx.x};
    forward<bf16, true>(x, w, y, scales, width, stride, eps, rounded);
}
extern "C" __global__ void rms_norm_backward_rounded_bf16(const bf16* dy, const bf16* x, const float* w, bf16* dx,
                                                          fp8* codes, float* code_scales, int width, int stride,
                                                          float eps) {
    wait_for_earlier_kernels();
    const RoundedRow rounded = {codes + (uint64_t)blockIdx.x * width, code_scales + blockIdx.x};
    backward<bf16, true>(dy, x, w, dx, width, stride, eps, rounded);
}
