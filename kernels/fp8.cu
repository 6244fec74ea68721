// Matrices in E4M3 with a scale for each row: activations and gradients, frozen weights, and their transposes; and the
// scales of a product that was computed without them. The twin of src/ops/fp8.rs, whose tests compare the bits.
#include "four_bit.cuh"
#include "rounded.cuh"

// Columns that share a scale in a transposed weight, and rows of the weight in a tile of it.
constexpr int COLUMNS = 64, TILE = 128;
// Rows of the weight that one block of `largest` reads.
constexpr int ROWS = 512;

// x[:, at..at + cols] with rows `stride` apart; x begins at column `at`. One block per row; cols, stride and `at` are
// multiples of eight.
template <typename T>
__device__ __forceinline__ void rows(const T* x, fp8* codes, float* scales, int cols, int stride) {
    x += (uint64_t)blockIdx.x * stride;
    Extent extent;
    for (int i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
        Eight<T> eight;
        eight.load(x + i);
        extent.take(eight.v);
    }
    round_row(x, extent, {codes + (uint64_t)blockIdx.x * cols, scales + blockIdx.x}, cols);
}

// A frozen weight [rows, cols] in any form of storage. It gives eight values from `flat` on, a multiple of eight, and a
// bound of the sizes of values from..to.
template <typename T> struct Dense {
    const T* values;
    __device__ __forceinline__ void load(float (&v)[8], unsigned long long flat) const {
        Eight<T> eight;
        eight.load(values + flat);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = eight.v[i];
    }
    __device__ __forceinline__ float bound(unsigned long long from, unsigned long long to) const {
        float largest = 0.f;
        for (; from < to; from += 8) {
            float v[8];
            load(v, from);
#pragma unroll
            for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(v[i]));
        }
        return largest;
    }
};

// 4-bit blocks. No code is larger than 1, so that a block's scale bounds its values. `values` are the code's 16.
struct FourBit {
    const uint8_t* packed;
    const float* values;
    Scales scales;
    int width_log2;
    __device__ __forceinline__ void load(float (&v)[8], unsigned long long flat) const {
        const uint32_t word = reinterpret_cast<const uint32_t*>(packed)[flat / 8];
        const float scale = scales.at(flat >> width_log2);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int shift = 8 * (i / 2) + (i % 2 == 0 ? 4 : 0);
            v[i] = __fmul_rn(values[word >> shift & 15], scale);
        }
    }
    __device__ __forceinline__ float bound(unsigned long long from, unsigned long long to) const {
        float largest = 0.f;
        for (unsigned long long block = from >> width_log2; block <= (to - 1) >> width_log2; ++block)
            largest = fmaxf(largest, fabsf(scales.at(block)));
        return largest;
    }
};

#define FOUR_BIT_PARAMETERS const uint8_t *packed, const uint8_t *absmax_codes, const float *absmax, float offset, \
                            int width_log2, int code
// The weight in `weight`, with its tables in shared memory. A block has 256 threads.
#define FOUR_BIT_WEIGHT                                                                     \
    SHARED_ARRAY(float, code_values, 16);                                                   \
    SHARED_ARRAY(float, map, 256);                                                          \
    if (threadIdx.x < 16) code_values[threadIdx.x] = CODES[code][threadIdx.x];              \
    if (absmax_codes != nullptr) map[threadIdx.x] = dynamic_map(threadIdx.x);               \
    __syncthreads();                                                                        \
    const FourBit weight = {packed, code_values, Scales{absmax_codes, absmax, map, offset}, width_log2}

// The rows of a 4-bit weight, one warp for each.
__device__ __forceinline__ void weight_rows(const FourBit& weight, fp8* codes, float* scales, int n, int cols) {
    const int lane = threadIdx.x & 31;
    const int row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (row >= n) return; // a whole warp leaves
    const unsigned long long from = (unsigned long long)row * cols, to = from + cols;
    float largest = 0.f;
    const unsigned long long last = (to - 1) >> weight.width_log2;
    for (unsigned long long block = (from >> weight.width_log2) + lane; block <= last; block += 32)
        largest = fmaxf(largest, fabsf(weight.scales.at(block)));
    const Scale scale = scale_of(warp_max(largest));
    if (lane == 0) scales[row] = scale.scale;
    for (int i = lane * 8; i < cols; i += 256) {
        Eight<fp8> out;
        weight.load(out.v, from + i);
        times(out.v, scale.inverse);
        out.store(codes + from + i);
    }
}

// Bounds of the sizes in groups of COLUMNS columns and ROWS rows: to[blockIdx.y][blockIdx.x].
template <typename Weight>
__device__ __forceinline__ void largest(const Weight& weight, float* to, int n, int cols) {
    const int column = blockIdx.x * COLUMNS, width = min(COLUMNS, cols - column);
    const int end = min(n, (int)(blockIdx.y + 1) * ROWS);
    float most = 0.f;
    for (int row = blockIdx.y * ROWS + threadIdx.x; row < end; row += blockDim.x) {
        const unsigned long long from = (unsigned long long)row * cols + column;
        most = fmaxf(most, weight.bound(from, from + width));
    }
    most = block_max(most);
    if (threadIdx.x == 0) to[blockIdx.y * gridDim.x + blockIdx.x] = most;
}

// The transpose [cols, n]: blockIdx.x is a group of columns, blockIdx.y a tile of rows. A thread takes eight columns of
// four rows, whose codes are neighbours in the result. `bounds` are those of `largest`.
template <typename Weight>
__device__ __forceinline__ void turned(const Weight& weight, const float* bounds, fp8* codes, float* scales, int n,
                                       int cols) {
    SHARED_ARRAY(uint32_t, tile, COLUMNS * (TILE / 4 + 1));
    float most = 0.f;
    for (int part = 0; part * ROWS < n; ++part) most = fmaxf(most, bounds[part * gridDim.x + blockIdx.x]);
    const Scale scale = scale_of(most);
    const int column = blockIdx.x * COLUMNS, width = min(COLUMNS, cols - column), first = blockIdx.y * TILE;
    if (blockIdx.y == 0 && (int)threadIdx.x < width) scales[column + threadIdx.x] = scale.scale;
    const int eight = (threadIdx.x & 7) * 8, four = threadIdx.x >> 3;
    uint32_t words[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = first + 4 * four + i;
        if (row < n && eight < width) {
            float v[8];
            weight.load(v, (unsigned long long)row * cols + column + eight);
            times(v, scale.inverse);
#pragma unroll
            for (int j = 0; j < 8; ++j) words[j] |= (uint32_t)narrow<fp8>(v[j]).bits << 8 * i;
        }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) tile[(eight + j) * (TILE / 4 + 1) + four] = words[j];
    __syncthreads();
    const int at = first + 4 * (threadIdx.x & 31);
    if (at >= n) return;
    for (int i = threadIdx.x >> 5; i < width; i += 8) {
        const uint64_t to = (uint64_t)(column + i) * n + at;
        *reinterpret_cast<uint32_t*>(codes + to) = tile[i * (TILE / 4 + 1) + (threadIdx.x & 31)];
    }
}

// y[t, i] = alpha * x_scales[t] * w_scales[i] * sums[t, i] + base[t, i], one block per row. `base` may be null, or y;
// `sums` may be y. All strides and first columns are multiples of eight.
template <typename T>
__device__ __forceinline__ void finish(const T* sums, const float* x_scales, const float* w_scales, const T* base, T* y,
                                       float alpha, int cols, int sums_stride, int stride) {
    sums += (uint64_t)blockIdx.x * sums_stride;
    const uint64_t row = (uint64_t)blockIdx.x * stride;
    const float of_row = alpha * x_scales[blockIdx.x];
    for (int i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
        Eight<T> eight, below;
        eight.load(sums + i);
        if (base != nullptr) below.load(base + row + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float scaled = of_row * w_scales[i + j] * eight.v[j];
            eight.v[j] = base != nullptr ? scaled + below.v[j] : scaled;
        }
        eight.store(y + row + i);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    fp8_four_bit_rows(FOUR_BIT_PARAMETERS, fp8* codes, float* scales, int n, int cols) {
    wait_for_earlier_kernels();
    FOUR_BIT_WEIGHT;
    weight_rows(weight, codes, scales, n, cols);
}
extern "C" __global__ void __launch_bounds__(256)
    fp8_four_bit_largest(FOUR_BIT_PARAMETERS, float* bounds, int n, int cols) {
    wait_for_earlier_kernels();
    FOUR_BIT_WEIGHT;
    largest(weight, bounds, n, cols);
}
extern "C" __global__ void __launch_bounds__(256)
    fp8_four_bit_turned(FOUR_BIT_PARAMETERS, const float* bounds, fp8* codes, float* scales, int n, int cols) {
    wait_for_earlier_kernels();
    FOUR_BIT_WEIGHT;
    turned(weight, bounds, codes, scales, n, cols);
}

#define INSTANTIATE(T, type)                                                                                         \
    extern "C" __global__ void __launch_bounds__(128)                                                               \
        fp8_rows_##type(const T* x, fp8* codes, float* scales, int cols, int stride) {                              \
        wait_for_earlier_kernels();                                                                                 \
        rows<T>(x, codes, scales, cols, stride);                                                                    \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                                               \
        fp8_largest_##type(const T* values, float* bounds, int n, int cols) {                                       \
        wait_for_earlier_kernels();                                                                                 \
        largest(Dense<T>{values}, bounds, n, cols);                                                                 \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                                               \
        fp8_turned_##type(const T* values, const float* bounds, fp8* codes, float* scales, int n, int cols) {       \
        wait_for_earlier_kernels();                                                                                 \
        turned(Dense<T>{values}, bounds, codes, scales, n, cols);                                                   \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(128)                                                               \
        fp8_finish_##type(const T* sums, const float* x_scales, const float* w_scales, const T* base, T* y,         \
                          float alpha, int cols, int sums_stride, int stride) {                                     \
        wait_for_earlier_kernels();                                                                                 \
        finish<T>(sums, x_scales, w_scales, base, y, alpha, cols, sums_stride, stride);                             \
    }
INSTANTIATE(float, f32)
INSTANTIATE(bf16, bf16)
