// Dropout by counters with the host's masks, one block per row. The twin of src/ops/dropout.rs.
#include "counter.cuh"

// y = x * scale if the hash of (row key, site, column) reaches `threshold`, else 0.
template <typename T>
__device__ __forceinline__ void apply(const T* x, const unsigned long long* keys, T* y, unsigned long long mixed_site,
                                      unsigned long long threshold, float scale, int width) {
    const unsigned long long row = mix(keys[blockIdx.x] ^ mixed_site);
    x += (uint64_t)blockIdx.x * width, y += (uint64_t)blockIdx.x * width;
    auto keep = [&](int column) { return mix(row + column) >> 32 >= threshold; };
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a;
            a.load(x + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) a.v[j] = keep(i + j) ? a.v[j] * scale : 0.f;
            a.store(y + i);
        }
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        y[i] = narrow<T>(keep(i) ? widen(x[i]) * scale : 0.f);
}

#define FOR(T, type)                                                                                                  \
    extern "C" __global__ void dropout_apply_##type(const T* x, const unsigned long long* keys, T* y,                 \
                                                    unsigned long long mixed_site, unsigned long long threshold,      \
                                                    float scale, int width) {                                         \
        wait_for_earlier_kernels();                                                                                   \
        apply<T>(x, keys, y, mixed_site, threshold, scale, width);                                                    \
    }
FOR(float, f32)
FOR(bf16, bf16)
