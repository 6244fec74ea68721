// The activation of the feed-forward, gated or not, one block per row. The twin of src/ops/activation.rs. The kernels
// `..._rounded` write each row in 8 bits too, with the bits of a separate pass over the stored values
// (kernels/rounded.cuh); their widths are multiples of eight.
#include "activation.cuh"
#include "rounded.cuh"

// x [rows, 2 * width] if gated (gate, then up), else [rows, width] -> h [rows, width], in rows `stride` apart.
template <typename T, typename Curve, bool ROUNDED = false>
__device__ __forceinline__ void forward(const T* x, T* h, int width, int stride, int gated, RoundedRow rounded = {}) {
    x += (uint64_t)blockIdx.x * width * (gated ? 2 : 1), h += (uint64_t)blockIdx.x * stride;
    if (width % 8 == 0) {
        Extent extent;
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a, up;
            a.load(x + i);
            if (gated) up.load(x + width + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) a.v[j] = Curve::at(a.v[j]).value * (gated ? up.v[j] : 1.f);
            a.store(h + i);
            if (ROUNDED) extent.take(a.v);
        }
        if (ROUNDED) round_row(h, extent, rounded, width);
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        h[i] = narrow<T>(Curve::at(widen(x[i])).value * (gated ? widen(x[width + i]) : 1.f));
}

// dh [rows, width] -> d, the gradient of x, in rows `stride` apart. If `keep` is set, dh becomes what `forward` writes.
// The gradients of gate and up are rounded as one row if `of_up` has no place, else each as a row of its own.
template <typename T, typename Curve, bool ROUNDED = false>
__device__ __forceinline__ void backward(T* dh, const T* x, T* d, int width, int stride, int gated, int keep,
                                         RoundedRow rounded = {}, RoundedRow of_up = {}) {
    x += (uint64_t)blockIdx.x * width * (gated ? 2 : 1), d += (uint64_t)blockIdx.x * stride;
    dh += (uint64_t)blockIdx.x * width;
    if (width % 8 == 0) {
        Extent of_a, of_b;
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
            if (ROUNDED) {
                of_a.take(a.v);
                if (gated) of_b.take(up.v);
            }
        }
        if (!ROUNDED) return;
        if (of_up.codes == nullptr) {
            of_a.take(of_b);
            round_row(d, of_a, rounded, gated ? 2 * width : width);
        } else {
            round_row(d, of_a, rounded, width);
            round_row(d + width, of_b, of_up, width);
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

#define ROUND_FOR(Curve, curve)                                                                                        \
    extern "C" __global__ void activation_forward_rounded_##curve##_bf16(const bf16* x, bf16* h, fp8* codes,           \
                                                                         float* scales, int width, int stride,         \
                                                                         int gated) {                                  \
        wait_for_earlier_kernels();                                                                                    \
        const RoundedRow rounded = {codes + (uint64_t)blockIdx.x * width, scales + blockIdx.x};                        \
        forward<bf16, Curve, true>(x, h, width, stride, gated, rounded);                                               \
    }                                                                                                                  \
    extern "C" __global__ void activation_backward_rounded_##curve##_bf16(                                             \
        bf16* dh, const bf16* x, bf16* d, fp8* codes, float* scales, fp8* up_codes, float* up_scales, int width,       \
        int stride, int gated, int keep) {                                                                             \
        wait_for_earlier_kernels();                                                                                    \
        const uint64_t row = blockIdx.x, columns = gated && up_codes == nullptr ? 2 * width : width;                   \
        RoundedRow rounded = {codes + row * columns, scales + row}, of_up = {};                                        \
        if (up_codes != nullptr) of_up = {up_codes + row * columns, up_scales + row};                                  \
        backward<bf16, Curve, true>(dh, x, d, width, stride, gated, keep, rounded, of_up);                             \
    }
ROUND_FOR(Silu, silu)
ROUND_FOR(GeluTanh, gelu_tanh)
ROUND_FOR(GeluErf, gelu_erf)
