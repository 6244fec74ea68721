// The activation of the feed-forward, gated or not, one block per row. The twin of src/ops/activation.rs.
#include "activation.cuh"

// x [rows, 2 * width] if gated (gate, then up), else [rows, width] -> h [rows, width], in rows `stride` apart.
template <typename T, typename Curve>
__device__ __forceinline__ void forward(const T* x, T* h, int width, int stride, int gated) {
    x += (uint64_t)blockIdx.x * width * (gated ? 2 : 1), h += (uint64_t)blockIdx.x * stride;
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a, up;
            a.load(x + i);
            if (gated) up.load(x + width + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) a.v[j] = Curve::at(a.v[j]).value * (gated ? up.v[j] : 1.f);
            a.store(h + i);
        }
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        h[i] = narrow<T>(Curve::at(widen(x[i])).value * (gated ? widen(x[width + i]) : 1.f));
}

// dh [rows, width] -> d, the gradient of x, in rows `stride` apart. If `keep` is set, dh becomes what `forward` writes.
template <typename T, typename Curve>
__device__ __forceinline__ void backward(T* dh, const T* x, T* d, int width, int stride, int gated, int keep) {
    x += (uint64_t)blockIdx.x * width * (gated ? 2 : 1), d += (uint64_t)blockIdx.x * stride;
    dh += (uint64_t)blockIdx.x * width;
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a, up, g;
            a.load(x + i), g.load(dh + i);
            if (gated) up.load(x + width + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const Point p = Curve::at(a.v[j]);
                const float factor = gated ? up.v[j] : 1.f;
                a.v[j] = g.v[j] * factor * p.slope;
                up.v[j] = g.v[j] * p.value;
                g.v[j] = p.value * factor;
            }
            a.store(d + i);
            if (gated) up.store(d + width + i);
            if (keep) g.store(dh + i);
        }
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const Point p = Curve::at(widen(x[i]));
        const float g = widen(dh[i]), up = gated ? widen(x[width + i]) : 1.f;
        d[i] = narrow<T>(g * up * p.slope);
        if (gated) d[width + i] = narrow<T>(g * p.value);
        if (keep) dh[i] = narrow<T>(p.value * up);
    }
}

#define FOR(Curve, curve, T, type)                                                                                     \
    extern "C" __global__ void activation_forward_##curve##_##type(const T* x, T* h, int width, int stride,            \
                                                                   int gated) {                                        \
        wait_for_earlier_kernels();                                                                                    \
        forward<T, Curve>(x, h, width, stride, gated);                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void activation_backward_##curve##_##type(T* dh, const T* x, T* d, int width, int stride,    \
                                                                    int gated, int keep) {                             \
        wait_for_earlier_kernels();                                                                                    \
        backward<T, Curve>(dh, x, d, width, stride, gated, keep);                                                      \
    }
FOR(Silu, silu, float, f32)
FOR(Silu, silu, bf16, bf16)
FOR(GeluTanh, gelu_tanh, float, f32)
FOR(GeluTanh, gelu_tanh, bf16, bf16)
FOR(GeluErf, gelu_erf, float, f32)
FOR(GeluErf, gelu_erf, bf16, bf16)
