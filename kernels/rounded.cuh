// Rows in E4M3 with a scale each, by the blocks that have a row: activations and gradients as products in 8 bits read
// them. The twin of src/ops/fp8.rs.
//
// A scale is a power of two, so that dividing by it is exact: a number is rounded once. 448 times the scale reaches the
// row's largest size, and no number is cut. A row of a matrix with a number that is not finite gets the scale NaN, so
// that every result of that row is NaN.
#pragma once
#include "eight_bits.cuh"

// The least exponent of a scale: rows of numbers below 2^-92 become coarse, and the reciprocal stays finite.
constexpr int EXPONENT_MIN = -100;

struct Scale {
    float scale, inverse;
};

// The least power of two with 448 * scale >= largest. 448 is 1.75 * 2^8.
__device__ __forceinline__ Scale scale_of(float largest) {
    const uint32_t bits = __float_as_uint(largest);
    int exponent = (int)(bits >> 23) - 127 - 8 + ((bits & 0x7fffffu) > 0x600000u ? 1 : 0);
    exponent = exponent < EXPONENT_MIN ? EXPONENT_MIN : exponent;
    return {__uint_as_float((uint32_t)(exponent + 127) << 23), __uint_as_float((uint32_t)(127 - exponent) << 23)};
}

__device__ __forceinline__ void times(float (&v)[8], float factor) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= factor;
}

// The sizes of the numbers that a thread has seen of a row: the largest, and 0 or NaN for one that is not finite.
struct Extent {
    float largest = 0.f, poison = 0.f;
    __device__ __forceinline__ void take(const float (&v)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            largest = fmaxf(largest, fabsf(v[i]));
            poison += v[i] * 0.f;
        }
    }
    __device__ __forceinline__ void take(const Extent& other) {
        largest = fmaxf(largest, other.largest);
        poison += other.poison;
    }
};

// A row's place in a matrix in 8 bits.
struct RoundedRow {
    fp8* codes;
    float* scale;
};

// Writes a row of T, which this block has stored or which was there before, rounded. `extent` has the sizes of its
// numbers, of each thread some, before or after they became T: both have the same largest. All threads of the block
// take part; cols is a multiple of eight.
template <typename T>
__device__ __forceinline__ void round_row(const T* row, const Extent& extent, RoundedRow to, int cols) {
    // After the barriers in these functions, all threads see the values that the block has stored.
    const float largest = widen(narrow<T>(block_max(extent.largest)));
    const float poison = block_sum(extent.poison) + largest * 0.f; // a large number became infinity
    const Scale scale = scale_of(largest);
    if (threadIdx.x == 0) *to.scale = scale.scale + poison;
    for (int i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
        Eight<T> eight;
        eight.load(row + i);
        times(eight.v, scale.inverse);
        Eight<fp8> out;
#pragma unroll
        for (int j = 0; j < 8; ++j) out.v[j] = eight.v[j];
        out.store(to.codes + i);
    }
}
