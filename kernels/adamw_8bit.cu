// One AdamW update with 8-bit moments, clipped by a norm that stays on the device. The twin of src/ops/adamw_8bit.rs.
//
// A block has at most 256 values, one for each thread. Its entry in the table is the index of the first value, the
// number of values, the index of their state, and flags (1: f32 moments, 2: the faster rate).
#include "common.cuh"

#define BLOCK 256
#define TURNS 4

struct Numbers {
    float beta1, c1, beta2, c2, epsilon, root2, clip;
};

// A dynamic map and the midpoints between its entries.
struct Map {
    const float *values, *bounds;
    // The number of the nearest entry, of two equally near ones the lower: how many midpoints lie below.
    __device__ __forceinline__ uint8_t nearest(float value) const {
        int below = 0;
#pragma unroll
        for (int width = 128; width > 0; width >>= 1)
            if (bounds[below + width - 1] < value) below += width;
        return (uint8_t)below;
    }
};

// The factor on the gradient, as torch clips: 1 without a limit (0), negative if the sum is not finite.
__device__ __forceinline__ float clipping(const double* squares, float norm_max) {
    if (!(*squares < (double)INFINITY)) return -1.f;
    return norm_max > 0.f ? (float)fmin(1., (double)norm_max / (sqrt(*squares) + 1e-6)) : 1.f;
}

// Rounds the block's moments. Every thread passes one; threads without a value pass 0.
__device__ __forceinline__ void round_to(const Map& map, float value, bool there, uint8_t* code, float* scale) {
    const float largest = block_max(fabsf(value));
    const float scaled = fminf(fmaxf(value * (1.f / fmaxf(largest, 1e-38f)), -1.f), 1.f);
    if (there) *code = map.nearest(scaled);
    if (threadIdx.x == 0) *scale = largest;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    adamw_8bit_step(float* params, const float* grads, bf16* copy, const uint32_t* table, int blocks, const float* maps,
                    uint8_t* codes, unsigned long long codes_half, float* scales, int scales_half, float* wide,
                    unsigned long long wide_half, const double* squares, float norm_max, float beta1, float c1,
                    float beta2, float c2, float epsilon, float root2, float decay, float rate, float faster_decay,
                    float faster_rate) {
    wait_for_earlier_kernels();
    SHARED_ARRAY(float, values, 512);
    SHARED_ARRAY(float, bounds, 512);
    SHARED_ARRAY(float, clip, 1);
    const int thread = threadIdx.x;
    for (int i = thread; i < 512; i += BLOCK) {
        values[i] = maps[i];
        if ((i & 255) < 255) bounds[i] = (maps[i] + maps[i + 1]) / 2.f;
    }
    if (thread == 0) *clip = clipping(squares, norm_max);
    __syncthreads();
    if (*clip < 0.f) return;
    const Map of_signed = {values, bounds}, of_unsigned = {values + 256, bounds + 256};
    const Numbers k = {beta1, c1, beta2, c2, epsilon, root2, *clip};
    for (int block = blockIdx.x * TURNS; block < blocks && block < (int)(blockIdx.x + 1) * TURNS; ++block) {
        const uint32_t* row = table + block * 4;
        const bool there = thread < (int)row[1], in_8_bits = !(row[3] & 1), faster = row[3] & 2;
        const uint64_t at = (uint64_t)row[0] + thread, state = (uint64_t)row[2] + thread;
        float m = 0.f, v = 0.f;
        if (there) {
            if (in_8_bits) {
                m = of_signed.values[codes[state]] * scales[block];
                v = of_unsigned.values[codes[codes_half + state]] * scales[scales_half + block];
            } else {
                m = wide[state], v = wide[wide_half + state];
            }
            const float g = grads[at] * k.clip;
            m = m * k.beta1 + g * k.c1;
            v = v * k.beta2 + g * g * k.c2;
            const float p = params[at] * (faster ? faster_decay : decay)
                - (faster ? faster_rate : rate) * m / (sqrtf(v) / k.root2 + k.epsilon);
            params[at] = p;
            if (copy != nullptr) copy[at] = narrow<bf16>(p);
            if (!in_8_bits) wide[state] = m, wide[wide_half + state] = v;
        }
        if (!in_8_bits) continue; // for all threads or for none
        round_to(of_signed, m, there, codes + state, scales + block);
        round_to(of_unsigned, v, there, codes + codes_half + state, scales + scales_half + block);
    }
}
