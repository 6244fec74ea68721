// NEFTune's noise on embeddings, with the host's numbers, one block per row. The twin of src/ops/noise.rs.
#include "counter.cuh"

// x += factor * u in place; u is uniform in +-most[row] and comes from the hash of (row key, site, column).
template <typename T>
__device__ __forceinline__ void add(T* x, const unsigned long long* keys, const float* most,
                                    unsigned long long mixed_site, float factor, int width) {
    const unsigned long long row = mix(keys[blockIdx.x] ^ mixed_site);
    const float bound = most[blockIdx.x];
    x += (uint64_t)blockIdx.x * width;
    auto noisy = [&](float value, int column) {
        // 24 bits: exact in f32, in [0, 1).
        const float share = (float)(mix(row + column) >> 40) * (1.f / 16777216.f);
        return value + factor * (share * (bound + bound) - bound);
    };
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a;
            a.load(x + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) a.v[j] = noisy(a.v[j], i + j);
            a.store(x + i);
        }
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) x[i] = narrow<T>(noisy(widen(x[i]), i));
}

#define FOR(T, type)                                                                                              \
    extern "C" __global__ void noise_add_##type(T* x, const unsigned long long* keys, const float* most,         \
                                                unsigned long long mixed_site, float factor, int width) {         \
        wait_for_earlier_kernels();                                                                               \
        add<T>(x, keys, most, mixed_site, factor, width);                                                         \
    }
FOR(float, f32)
FOR(bf16, bf16)
