// The meaning of stored 4-bit weights: the values of their codes, and the scales of their blocks. Products and sums are
// written so that nvcc cannot fuse them, and values are exact to the last bit.
#pragma once
#include "common.cuh"

// The value of each index, NF4 then FP4.
__constant__ float CODES[2][16] = {
    {-1.f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.f, 0.0795803f,
     0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.f},
    {0.f, 0.0052083335f, 0.6666667f, 1.f, 0.33333334f, 0.5f, 0.16666667f, 0.25f, 0.f, -0.0052083335f, -0.6666667f,
     -1.f, -0.33333334f, -0.5f, -0.16666667f, -0.25f}};

// bitsandbytes' dynamic map of a scale's code: 127 negative values, 0, 127 positive ones, 1. Decade d of seven has
// 2^d values, each the middle of two neighbours among 2^d + 1 evenly spaced ones from 0.1 to 1, rounded as
// torch.linspace does.
__device__ __forceinline__ float dynamic_map(int code) {
    if (code == 127) return 0.f;
    if (code == 255) return 1.f;
    const int rank = code > 127 ? code - 127 : 127 - code;  // 1..127
    const int decade = 31 - __clz(rank), steps = 1 << decade, i = rank - steps;
    const float step = (1.f - 0.1f) / (float)steps;
    auto at = [&](int i) {
        return i < (steps + 1) / 2 ? __fmaf_rn(step, (float)i, 0.1f) : __fmaf_rn(step, (float)(i - steps), 1.f);
    };
    const float powers[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.f};
    float power = powers[0];
#pragma unroll
    for (int d = 1; d < 7; ++d) power = decade == d ? powers[d] : power;
    const float value = __fmul_rn(__fmul_rn(__fadd_rn(at(i), at(i + 1)), 0.5f), power);
    return code > 127 ? value : -value;
}

// Scales: plain f32 (`codes` is null), or map[code] * (absmax of 256 scales) + offset.
struct Scales {
    const uint8_t* codes;
    const float* absmax;
    const float* map;
    float offset;
    __device__ __forceinline__ float at(unsigned long long block) const {
        if (codes == nullptr) return absmax[block];
        return __fadd_rn(__fmul_rn(map[codes[block]], absmax[block >> 8]), offset);
    }
};
