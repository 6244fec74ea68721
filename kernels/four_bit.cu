// 4-bit block quantisation with bitsandbytes' bits, and back. The twin of src/ops/four_bit.rs, whose tests compare
// the two.
//
// If a code or a value must be exact to the last bit, products and sums are written so that nvcc cannot fuse them.
#include "four_bit.cuh"
#include "low_rank.cuh"

// The indices of each code in ascending order of their values, lowest in the low nibble.
__constant__ unsigned long long ASCENDING[2] = {0xfedcba9876543210ull, 0x3254761809efcdabull};

// A stored value, widened to f32, for the types that checkpoints hold.
struct F32 {
    typedef float Stored;
    static __device__ __forceinline__ float widen(float x) { return x; }
};
struct Bf16 {
    typedef uint16_t Stored;
    static __device__ __forceinline__ float widen(uint16_t x) { return __uint_as_float((uint32_t)x << 16); }
};
struct F16 {
    typedef uint16_t Stored;
    // A product with 2^112 moves the exponent into place. It is exact for subnormals too; infinity and NaN are
    // handled apart.
    static __device__ __forceinline__ float widen(uint16_t x) {
        const uint32_t sign = (uint32_t)(x & 0x8000u) << 16, rest = (uint32_t)(x & 0x7fffu) << 13;
        const uint32_t finite = __float_as_uint(__uint_as_float(rest) * 5.192296858534828e33f);
        return __uint_as_float(sign | (rest >= 0x0f800000u ? rest | 0x7f800000u : finite));
    }
};

// A warp handles one block of `width` values. There are n values in all; the last block may be short, and n odd. A
// block with a value that is not finite gets the scale NaN, which nothing else gives. The host sees it when it
// reads the scales.
template <typename From>
__device__ __forceinline__ void quantize(const typename From::Stored* values, uint8_t* packed, float* absmax,
                                         unsigned long long n, int width, int code) {
    const int lane = threadIdx.x & 31;
    const unsigned long long block = ((unsigned long long)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
    const unsigned long long from = block * width;
    if (from >= n) return; // a whole warp leaves
    const int count = n - from < (unsigned long long)width ? (int)(n - from) : width;
    const bool full = count == width;
    values += from, packed += from / 2;
    float largest = 0.f, poison = 0.f;
    for (int i = lane; i < count; i += 32) {
        const float x = From::widen(values[i]);
        largest = fmaxf(largest, fabsf(x));
        poison += x * 0.f; // 0, or NaN for a value that is not finite
    }
    largest = warp_max(largest), poison = warp_sum(poison);
    const float floor = fmaxf(largest, 1e-38f), reciprocal = __fdiv_rn(1.f, floor);
    if (lane == 0) absmax[block] = (full ? largest : floor) + poison;
    const float* codes = CODES[code];
    const unsigned long long ascending = ASCENDING[code];
    float bounds[15];
#pragma unroll
    for (int i = 0; i < 15; ++i) {
        const float low = codes[(ascending >> (4 * i)) & 15], high = codes[(ascending >> (4 * i + 4)) & 15];
        bounds[i] = __fmul_rn(__fadd_rn(low, high), 0.5f);
    }
    // A full block multiplies by the reciprocal, a short one divides, as the reference does.
    auto nibble = [&](float x) {
        const float scaled = full ? __fmul_rn(x, reciprocal) : __fdiv_rn(x, floor);
        int above = 0;
#pragma unroll
        for (int i = 0; i < 15; ++i) above += scaled > bounds[i];
        return (uint32_t)(ascending >> (4 * above)) & 15u;
    };
    for (int i = lane; 2 * i < count; i += 32) {
        const uint32_t high = nibble(From::widen(values[2 * i]));
        const uint32_t low = nibble(2 * i + 1 < count ? From::widen(values[2 * i + 1]) : 0.f);
        packed[i] = (uint8_t)(high << 4 | low);
    }
}

// A thread takes four groups of eight values, neighbours among its warp's: 4 bytes in, 16 or 32 bytes out, four loads
// in flight. The 16 values of the code lie in 16 banks of shared memory, where no two threads can collide. Loaded lines
// are marked as first to leave the cache. The results stay in it, since the product that follows reads them.
constexpr int GROUPS = 4;

// The place of a group of eight values in the result. Rows have `groups` groups and lie `stride` values apart; if
// `groups` is 0, groups lie one after the other. `factor` and `shift` divide by `groups` (Granlund and Montgomery
// 1994): for numbers below 2^31, number / groups = number * factor >> shift.
struct Rows {
    int groups, stride, shift;
    unsigned long long factor;
    __device__ __forceinline__ uint64_t at(unsigned long long group) const {
        if (groups == 0) return group * 8;
        const uint32_t row = (uint32_t)(group * factor >> shift);
        return (uint64_t)row * stride + ((uint32_t)group - row * (uint32_t)groups) * 8;
    }
};

template <typename T>
__device__ __forceinline__ void dequantize(const uint8_t* packed, const uint8_t* codes, const float* absmax,
                                           float offset, T* out, unsigned long long n, int width_log2, int code,
                                           const Rows rows) {
    SHARED_ARRAY(float, values, 16);
    SHARED_ARRAY(float, map, 256);
    const unsigned long long first = (unsigned long long)blockIdx.x * blockDim.x * GROUPS + threadIdx.x;
    uint32_t words[GROUPS];
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
        const unsigned long long group = first + j * blockDim.x;
        words[j] = group < n / 8 ? __ldcs(reinterpret_cast<const uint32_t*>(packed) + group) : 0;
    }
    if (threadIdx.x < 16) values[threadIdx.x] = CODES[code][threadIdx.x];
    if (codes != nullptr) map[threadIdx.x] = dynamic_map(threadIdx.x);
    __syncthreads();
    const Scales scales = {codes, absmax, map, offset};
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
        const unsigned long long group = first + j * blockDim.x, from = group * 8;
        if (from >= n) return;
        const float scale = scales.at(from >> width_log2);
        if (from + 8 <= n) {
            Eight<T> eight;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int shift = 8 * (i / 2) + (i % 2 == 0 ? 4 : 0);
                eight.v[i] = __fmul_rn(values[words[j] >> shift & 15], scale);
            }
            eight.store(out + rows.at(group));
        } else {
            for (unsigned long long i = from; i < n; ++i) {
                const float value = __fmul_rn(values[packed[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15], scale);
                out[i] = narrow<T>(value);
            }
        }
    }
}

#define FROM(From, type)                                                                                         \
    extern "C" __global__ void four_bit_quantize_##type(const From::Stored* values, uint8_t* packed, float* absmax, \
                                                        unsigned long long n, int width, int code) {             \
        wait_for_earlier_kernels();                                                                              \
        quantize<From>(values, packed, absmax, n, width, code);                                                  \
    }
FROM(F32, f32)
FROM(Bf16, bf16)
FROM(F16, f16)

#define INTO(T, type)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                           \
        four_bit_dequantize_##type(const uint8_t* packed, const uint8_t* codes, const float* absmax,            \
                                   float offset, T* out, unsigned long long n, int width_log2, int code,        \
                                   int groups, int stride, int shift, unsigned long long factor) {              \
        wait_for_earlier_kernels();                                                                             \
        dequantize<T>(packed, codes, absmax, offset, out, n, width_log2, code,                                  \
                      Rows{groups, stride, shift, factor});                                                     \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                           \
        four_bit_inside_##type(const uint8_t* packed, const uint8_t* codes, const float* absmax, float offset,  \
                               T* out, unsigned long long n, int width_log2, int code, int groups, int stride,  \
                               int shift, unsigned long long factor, int blocks, int spare,                     \
                               PAIR_PARAMETERS(T)) {                                                            \
        wait_for_earlier_kernels();                                                                             \
        if ((int)blockIdx.x < blocks) {                                                                         \
            dequantize<T>(packed, codes, absmax, offset, out, n, width_log2, code,                              \
                          Rows{groups, stride, shift, factor});                                                 \
            return;                                                                                             \
        }                                                                                                       \
        const Pair<T> pairs[3] = PAIRS;                                                                         \
        insert<T>(out, groups * 8, spare, pairs, blockIdx.x - blocks);                                          \
    }
// `inside` is `dequantize` of the first of the weights side by side; the blocks behind the first `blocks` put the pairs
// of all of them beside and below.
INTO(float, f32)
INTO(bf16, bf16)
