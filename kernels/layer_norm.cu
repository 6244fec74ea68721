// Layer norm: y = w * (x - mean) / sqrt(var + eps) + b, one block per row. The twin of src/ops/layer_norm.rs. Written
// rows lie `stride` apart, a multiple of eight if the width is one. The kernels `..._rounded` write each row in 8 bits
// too, with the bits of a separate pass over the stored values (kernels/rounded.cuh); their widths are multiples of
// eight.
#include "rounded.cuh"

struct Moments {
    float mean, scale;
};

// Two passes, the second from the cache, so that a mean far from zero costs no digits.
template <typename T>
__device__ __forceinline__ Moments moments(const T* x, int width, float eps) {
    float sum = 0.f;
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a;
            a.load(x + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += a.v[j];
        }
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) sum += widen(x[i]);
    }
    const float mean = block_sum(sum) / (float)width;
    float squares = 0.f;
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a;
            a.load(x + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) squares += (a.v[j] - mean) * (a.v[j] - mean);
        }
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) squares += (widen(x[i]) - mean) * (widen(x[i]) - mean);
    }
    return {mean, 1.f / sqrtf(block_sum(squares) / (float)width + eps)};
}

template <typename T, bool ROUNDED = false>
__device__ __forceinline__ void forward(const T* x, const float* w, const float* b, T* y, int width, int stride,
                                        float eps, RoundedRow rounded = {}) {
    x += (uint64_t)blockIdx.x * width, y += (uint64_t)blockIdx.x * stride;
    const Moments of = moments(x, width, eps);
    Extent extent;
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a;
            Eight<float> weight, bias;
            a.load(x + i), weight.load(w + i), bias.load(b + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) a.v[j] = (a.v[j] - of.mean) * of.scale * weight.v[j] + bias.v[j];
            a.store(y + i);
            if (ROUNDED) extent.take(a.v);
        }
        if (ROUNDED) round_row(y, extent, rounded, width);
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        y[i] = narrow<T>((widen(x[i]) - of.mean) * of.scale * w[i] + b[i]);
}

// dx += (g - mean(g) - n * mean(g * n)) * scale, with n = (x - mean) * scale and g = dy * w.
template <typename T, bool ROUNDED = false>
__device__ __forceinline__ void backward(const T* dy, const T* x, const float* w, T* dx, int width, int stride,
                                         float eps, RoundedRow rounded = {}) {
    const uint64_t row = (uint64_t)blockIdx.x * width;
    dy += row, x += row, dx += (uint64_t)blockIdx.x * stride;
    const Moments of = moments(x, width, eps);
    float sum = 0.f, dot = 0.f;
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a, d;
            Eight<float> weight;
            a.load(x + i), d.load(dy + i), weight.load(w + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float g = d.v[j] * weight.v[j];
                sum += g, dot += g * (a.v[j] - of.mean);
            }
        }
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            const float g = widen(dy[i]) * w[i];
            sum += g, dot += g * (widen(x[i]) - of.mean);
        }
    }
    const float mean = block_sum(sum) / (float)width;
    const float pull = of.scale * of.scale * block_sum(dot) / (float)width;
    Extent extent;
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a, d, to;
            Eight<float> weight;
            a.load(x + i), d.load(dy + i), to.load(dx + i), weight.load(w + i);
#pragma unroll
            for (int j = 0; j < 8; ++j)
                to.v[j] += (d.v[j] * weight.v[j] - mean - (a.v[j] - of.mean) * pull) * of.scale;
            to.store(dx + i);
            if (ROUNDED) extent.take(to.v);
        }
        if (ROUNDED) round_row(dx, extent, rounded, width);
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float grown = (widen(dy[i]) * w[i] - mean - (widen(x[i]) - of.mean) * pull) * of.scale;
        dx[i] = narrow<T>(widen(dx[i]) + grown);
    }
}

#define FOR(T, type)                                                                                                   \
    extern "C" __global__ void layer_norm_forward_##type(const T* x, const float* w, const float* b, T* y, int width,  \
                                                         int stride, float eps) {                                      \
        wait_for_earlier_kernels();                                                                                    \
        forward<T>(x, w, b, y, width, stride, eps);                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void layer_norm_backward_##type(const T* dy, const T* x, const float* w, T* dx, int width,   \
                                                          int stride, float eps) {                                     \
        wait_for_earlier_kernels();                                                                                    \
        backward<T>(dy, x, w, dx, width, stride, eps);                                                                 \
    }
FOR(float, f32)
FOR(bf16, bf16)

extern "C" __global__ void layer_norm_forward_rounded_bf16(const bf16* x, const float* w, const float* b, bf16* y,
                                                           fp8* codes, float* code_scales, int width, int stride,
                                                           float eps) {
    wait_for_earlier_kernels();
    const RoundedRow rounded = {codes + (uint64_t)blockIdx.x * width, code_scales + blockIdx.x};
    forward<bf16, true>(x, w, b, y, width, stride, eps, rounded);
}
extern "C" __global__ void layer_norm_backward_rounded_bf16(const bf16* dy, const bf16* x, const float* w, bf16* dx,
                                                            fp8* codes, float* code_scales, int width, int stride,
                                                            float eps) {
    wait_for_earlier_kernels();
    const RoundedRow rounded = {codes + (uint64_t)blockIdx.x * width, code_scales + blockIdx.x};
    backward<bf16, true>(dy, x, w, dx, width, stride, eps, rounded);
}
