// DoRA's magnitudes: lengths of a weight's rows, columns scaled by magnitude over length, and the gradient of the
// magnitudes. The twin of src/ops/magnitude.rs. Magnitudes and lengths are f32 and may begin at any element.
#include "common.cuh"

// Squares of the lengths of the rows of a weight, one block per row.
template <typename T>
__device__ __forceinline__ void squares(const T* w, float* to, int width) {
    w += (uint64_t)blockIdx.x * width;
    float sum = 0.f;
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            Eight<T> a;
            a.load(w + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += a.v[j] * a.v[j];
        }
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) sum += widen(w[i]) * widen(w[i]);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) to[blockIdx.x] = sum;
}

// 1 / sqrt(squares + scale * (sum over r of B[i, r] q[r, i])), and 0 for a row of zeros; one thread per row of B.
template <typename T>
__device__ __forceinline__ void inverse(const float* squares, const T* b, const float* q, float* to, int n, int rank,
                                        float scale) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float sum = 0.f;
    for (int r = 0; r < rank; ++r) sum += widen(b[(uint64_t)i * rank + r]) * q[(uint64_t)r * n + i];
    const float square = squares[i] + scale * sum;
    to[i] = square > 0.f ? 1.f / sqrtf(square) : 0.f;
}

// to[:, to_at..] (+)= strength * (magnitude * inverse - shift) * from[:, from_at..], one block per row.
template <typename T>
__device__ __forceinline__ void scale(const float* magnitude, const float* inverse, const T* from, T* to, int n,
                                      int from_width, int from_at, int to_width, int to_at, int add, float shift,
                                      float strength) {
    from += (uint64_t)blockIdx.x * from_width + from_at;
    to += (uint64_t)blockIdx.x * to_width + to_at;
    if ((n | from_width | from_at | to_width | to_at) % 8 == 0) {
        for (int i = threadIdx.x * 8; i < n; i += blockDim.x * 8) {
            Eight<T> a, sum;
            a.load(from + i);
            if (add) sum.load(to + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float scaled = strength * (magnitude[i + j] * inverse[i + j] - shift) * a.v[j];
                sum.v[j] = add ? sum.v[j] + scaled : scaled;
            }
            sum.store(to + i);
        }
        return;
    }
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float scaled = strength * (magnitude[i] * inverse[i] - shift) * widen(from[i]);
        to[i] = narrow<T>(add ? widen(to[i]) + scaled : scaled);
    }
}

// gradient[i] += inverse[i] * (sum over rows of dy[row, at + i] * z[row, i]). A block has 32 columns; each of its 32
// warps sums every 32nd row.
template <typename T>
__device__ __forceinline__ void gradient(const T* dy, const T* z, const float* inverse, float* to, int rows, int n,
                                         int width, int at) {
    SHARED_ARRAY(float, parts, 32 * 32);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, i = blockIdx.x * 32 + lane;
    float sum = 0.f;
    if (i < n) {
#pragma unroll 4
        for (int row = warp; row < rows; row += 32)
            sum += widen(dy[(uint64_t)row * width + at + i]) * widen(z[(uint64_t)row * n + i]);
    }
    parts[warp * 32 + lane] = sum;
    __syncthreads();
    if (warp == 0 && i < n) {
        for (int other = 1; other < 32; ++other) sum += parts[other * 32 + lane];
        to[i] += inverse[i] * sum;
    }
}

#define FOR(T, type)                                                                                                   \
    extern "C" __global__ void magnitude_squares_##type(const T* w, float* to, int width) {                            \
        wait_for_earlier_kernels();                                                                                    \
        squares<T>(w, to, width);                                                                                      \
    }                                                                                                                  \
    extern "C" __global__ void magnitude_inverse_##type(const float* squares, const T* b, const float* q, float* to,   \
                                                        int n, int rank, float scale) {                                \
        wait_for_earlier_kernels();                                                                                    \
        inverse<T>(squares, b, q, to, n, rank, scale);                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void magnitude_scale_##type(const float* magnitude, const float* inverse, const T* from,     \
                                                      T* to, int n, int from_width, int from_at, int to_width,         \
                                                      int to_at, int add, float shift, float strength) {               \
        wait_for_earlier_kernels();                                                                                    \
        scale<T>(magnitude, inverse, from, to, n, from_width, from_at, to_width, to_at, add, shift, strength);         \
    }                                                                                                                  \
    extern "C" __global__ void magnitude_gradient_##type(const T* dy, const T* z, const float* inverse, float* to,     \
                                                         int rows, int n, int width, int at) {                         \
        wait_for_earlier_kernels();                                                                                    \
        gradient<T>(dy, z, inverse, to, rows, n, width, at);                                                           \
    }
FOR(float, f32)
FOR(bf16, bf16)
