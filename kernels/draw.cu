// Logits -> a token drawn for each row, one block a row; the twin of src/ops/draw.rs, with the filters and the draw of
// src/generate/sampling.rs.
//
// Each filter is a number: the smallest logit that stays. It is found by halving the range of the logits' bits, which
// ascend as the logits do. Sums are taken in f64 and in a fixed order.
#include "common.cuh"

constexpr uint32_t NONE = 0xffffffffu;
constexpr int SEGMENTS = 1024;

struct Smallest {
    static __device__ __forceinline__ uint32_t of(uint32_t a, uint32_t b) { return a < b ? a : b; }
};

// A number that ascends as the logit does; -0 comes before 0.
__device__ __forceinline__ uint32_t key_of(float logit) {
    const uint32_t bits = __float_as_uint(logit);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// A row of logits, and how one of its tokens is drawn.
struct Row {
    const float* logits;
    int vocab;
    float highest;
    double rate;  // 1 / temperature

    // The probability of a token relative to that of the most probable one.
    __device__ __forceinline__ double weight(float logit) const {
        return exp(((double)logit - (double)highest) * rate);
    }

    // The largest logit such that `value` of all logits from it on sums up to at least `wanted`. `lowest` is returned
    // if no other does. Every thread gets the result.
    template <typename T, typename Value>
    __device__ float reaching(T wanted, float lowest, Value value) const {
        // The logits from key `high` on sum up to `beyond`, which is less than `wanted`.
        uint32_t low = lowest == 0.f ? key_of(-0.f) : key_of(lowest), high = key_of(highest) + 1;
        T beyond = 0;
        while (high - low > 1) {
            const uint32_t middle = low + (high - low) / 2;
            T sum = 0;
            for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
                const float logit = logits[i];
                const uint32_t key = key_of(logit);
                if (isfinite(logit) && key >= middle && key < high) sum += value(logit);
            }
            sum = beyond + block_merged<Sum>(sum, (T)0);
            if (sum >= wanted) low = middle;
            else high = middle, beyond = sum;
        }
        return logit_of(low);
    }
};

struct One {
    __device__ __forceinline__ int operator()(float) const { return 1; }
};
struct Weight {
    Row row;
    __device__ __forceinline__ double operator()(float logit) const { return row.weight(logit); }
};

// draws[row]: temperature (0: the most probable token), top_k, top_p, min_p, and a number from [0, 1) that decides. A
// row without a finite logit gets NONE.
extern "C" __global__ void __launch_bounds__(512) draw_tokens(const float* logits, const double* draws, uint32_t* tokens, int vocab) {
    wait_for_earlier_kernels();
    SHARED_ARRAY(double, sums, SEGMENTS);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    draws += (uint64_t)blockIdx.x * 5;
    Row row = {logits + (uint64_t)blockIdx.x * vocab, vocab, -INFINITY, 0.};
    float lowest = INFINITY;
    int count = 0;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        const float logit = row.logits[i];
        if (!isfinite(logit)) continue;
        row.highest = fmaxf(row.highest, logit), lowest = fminf(lowest, logit), ++count;
    }
    row.highest = block_max(row.highest), lowest = -block_max(-lowest), count = block_merged<Sum>(count, 0);
    if (count == 0 || draws[0] <= 0.) {
        uint32_t first = NONE;
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
            if (count > 0 && row.logits[i] == row.highest) {
                first = i;
                break;
            }
        }
        first = block_merged<Smallest>(first, NONE);
        if (threadIdx.x == 0) tokens[blockIdx.x] = first;
        return;
    }

    row.rate = 1. / draws[0];
    float smallest = lowest;
    if (draws[1] > 0. && draws[1] < (double)count) smallest = row.reaching((int)draws[1], lowest, One{});
    if (draws[2] < 1.) {
        double total = 0.;
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
            const float logit = row.logits[i];
            if (isfinite(logit) && logit >= smallest) total += row.weight(logit);
        }
        total = block_merged<Sum>(total, 0.);
        smallest = row.reaching(draws[2] * total, smallest, Weight{row});
    }

    // The weight of a token that stays, else 0.
    const auto kept = [&](int i) {
        const float logit = i < vocab ? row.logits[i] : NAN;
        if (!(isfinite(logit) && logit >= smallest)) return 0.;
        const double weight = row.weight(logit);
        return weight >= draws[3] ? weight : 0.;
    };
    // Tokens in the order of their numbers, in segments, one at a time for each warp.
    int width = (vocab + SEGMENTS - 1) / SEGMENTS;
    width = width < 512 ? 512 : (width + 31) / 32 * 32;
    const int segments = (vocab + width - 1) / width;
    for (int segment = warp; segment < segments; segment += warps) {
        double sum = 0.;
        for (int i = lane; i < width; i += 32) sum += kept(segment * width + i);
        sum = warp_merged<Sum>(sum);
        if (lane == 0) sums[segment] = sum;
    }
    __syncthreads();
    if (warp > 0) return;
    double total = 0.;
    for (int i = 0; i < segments; ++i) total += sums[i];
    double left = draws[4] * total;
    int segment = 0, last = 0;
    for (; segment < segments && left >= sums[segment]; ++segment) {
        left -= sums[segment];
        if (sums[segment] > 0.) last = segment;
    }
    // Rounding took the last bit.
    if (segment == segments) segment = last, left = INFINITY;
    uint32_t token = NONE;
    for (int from = 0; from < width; from += 32) {
        const int i = segment * width + from + lane;
        const double weight = kept(i);
        double before = weight;
#pragma unroll
        for (int offset = 1; offset < 32; offset <<= 1) {
            const double other = __shfl_up_sync(0xffffffffu, before, offset);
            if (lane >= offset) before += other;
        }
        const uint32_t here = __ballot_sync(0xffffffffu, weight > 0. && left < before);
        const uint32_t any = __ballot_sync(0xffffffffu, weight > 0.);
        if (here != 0) {
            token = segment * width + from + __ffs(here) - 1;
            break;
        }
        if (any != 0) token = segment * width + from + 31 - __clz(any);
        left -= __shfl_sync(0xffffffffu, before, 31);
    }
    if (lane == 0) tokens[blockIdx.x] = token;
}
