// Rotary position embedding: angles from positions, and the rotation in place. The twin of src/ops/rope.rs.
#include "rope.cuh"

// cos and sin [rows, half] of position * frequency, times `attention`. Angles reach 10^5 radians and more, so the
// angle is a product in f32 as in transformers, and cosf and sinf reduce it exactly.
extern "C" __global__ void rope_angles(const uint32_t* positions, const uint32_t* sets, const float* frequencies,
                                       float attention, float* cosines, float* sines, int half) {
    wait_for_earlier_kernels();
    const uint64_t row = (uint64_t)blockIdx.x * half;
    const float position = (float)positions[blockIdx.x];
    const float* frequency = frequencies + (uint64_t)sets[blockIdx.x] * half;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        const float angle = __fmul_rn(position, frequency[i]);
        cosines[row + i] = cosf(angle) * attention;
        sines[row + i] = sinf(angle) * attention;
    }
}

// A block rotates the first `heads` heads of a row. A thread handles eight pairs if all lie at multiples of 16
// bytes, else one.
template <typename T>
__device__ __forceinline__ void rotate(T* x, const float* cosines, const float* sines, int stride, int heads,
                                       int width, int half, float sign) {
    x += (uint64_t)blockIdx.x * stride;
    cosines += (uint64_t)blockIdx.x * half, sines += (uint64_t)blockIdx.x * half;
    if (half % 8 == 0 && width % 8 == 0 && stride % 8 == 0) {
        const int parts = half / 8;
        for (int item = threadIdx.x; item < heads * parts; item += blockDim.x) {
            const int head = item / parts, i = (item - head * parts) * 8;
            T* at = x + head * width + i;
            Eight<T> a, b;
            Eight<float> c, s;
            a.load(at), b.load(at + half), c.load(cosines + i), s.load(sines + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) turn_pair(a.v[j], b.v[j], c.v[j], s.v[j] * sign);
            a.store(at), b.store(at + half);
        }
        return;
    }
    for (int item = threadIdx.x; item < heads * half; item += blockDim.x) {
        const int head = item / half, i = item - head * half;
        T* at = x + head * width + i;
        float left = widen(at[0]), right = widen(at[half]);
        turn_pair(left, right, cosines[i], sines[i] * sign);
        at[0] = narrow<T>(left), at[half] = narrow<T>(right);
    }
}

#define FOR(T, type)                                                                                               \
    extern "C" __global__ void rope_rotate_##type(T* x, const float* cosines, const float* sines, int stride,      \
                                                  int heads, int width, int half, float sign) {                    \
        wait_for_earlier_kernels();                                                                                \
        rotate<T>(x, cosines, sines, stride, heads, width, half, sign);                                            \
    }
FOR(float, f32)
FOR(bf16, bf16)
