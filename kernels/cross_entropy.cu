// One row of logits -> its loss and, in place, the gradient of scale * loss. The twin of src/ops/cross_entropy.rs.
//
// A block handles a row of `vocab` logits. Rows lie `stride` apart, a multiple of eight, so that every row can be
// read 16 bytes at a time. The first pass keeps a running maximum and sum (Milakov and Gimelshein 2018); the second
// finds the row in the L2 cache.
#include "common.cuh"

// The sum of exp(x - largest) over the values seen so far. Two sums can be merged in any order, exactly up to
// rounding.
struct Running {
    float largest, sum;
    // A sum starts at the lowest finite number, because infinity minus infinity would give a NaN that no logit has.
    static __device__ __forceinline__ Running none() { return {-3.402823466e38f, 0.f}; }
    __device__ __forceinline__ void rise(float to) {
        sum *= expf(largest - to);
        largest = to;
    }
    __device__ __forceinline__ void add(float x) {
        if (x > largest) rise(x);
        sum += expf(x - largest); // NaN stays in the sum, so a bad logit is never hidden
    }
    __device__ __forceinline__ void merge(Running other) {
        const float to = fmaxf(largest, other.largest);
        rise(to), other.rise(to);
        sum += other.sum;
    }
};

__device__ __forceinline__ Running warp_merge(Running x) {
#ifdef CUDA_EMU
    // The same merges, in one step (emulator/warp.h).
    struct Merge {
        static Running of(Running a, Running b) {
            a.merge(b);
            return a;
        }
    };
    return emulator::merged_warp<Merge>(x, EMULATOR_SITE("a warp's merge"));
#else
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        Running other;
        other.largest = __shfl_xor_sync(0xffffffffu, x.largest, offset);
        other.sum = __shfl_xor_sync(0xffffffffu, x.sum, offset);
        x.merge(other);
    }
    return x;
#endif
}

__device__ __forceinline__ Running block_merge(Running x) {
    SHARED_ARRAY(float, largest, 32);
    SHARED_ARRAY(float, sums, 32);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    x = warp_merge(x);
    if (lane == 0) largest[warp] = x.largest, sums[warp] = x.sum;
    __syncthreads();
    const bool there = lane < (int)(blockDim.x >> 5);
    Running part = Running::none();
    if (there) part = {largest[lane], sums[lane]};
    return warp_merge(part);
}

// cap * tanh(x / cap) and its slope 1 - tanh^2; without a cap (0), x and 1.
struct Cap {
    float cap;
    __device__ __forceinline__ float value(float x) const { return cap == 0.f ? x : cap * tanhf(x / cap); }
    __device__ __forceinline__ float slope(float capped) const {
        const float t = capped / cap;
        return cap == 0.f ? 1.f : 1.f - t * t;
    }
};

// Stores 1 if the target has the largest logit and none before it has the same, else 0. `largest`: it has.
template <typename T>
__device__ __forceinline__ void hit(const T* row, int target, bool largest, const Cap& cap, float* to) {
    const float at_target = cap.value(widen(row[target]));
    float before = 0.f;
    if (largest) // for all threads or for none
        for (int i = threadIdx.x; i < target; i += blockDim.x)
            if (cap.value(widen(row[i])) >= at_target) before = 1.f;
    before = block_max(before);
    if (threadIdx.x == 0) *to = largest && before == 0.f ? 1.f : 0.f;
}

// The result of a kernel besides the loss: the gradient, for a plain or a smoothed target, or whether the target has
// the largest logit.
enum Task { PLAIN, SMOOTHED, COUNTED };

// The padding of a list of targets: its row has no loss and no gradient.
const uint32_t NO_TARGET = 0xffffffffu;

template <typename T>
__device__ __forceinline__ void clear(T* row, int vocab, float* loss) {
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) row[i] = narrow<T>(0.f);
    if (threadIdx.x == 0) *loss = 0.f;
}

// `smoothing`: the share of the target that goes to all tokens alike.
template <typename T, Task TASK>
__device__ __forceinline__ void rows(T* logits, const uint32_t* targets, float* losses, float* hits, int vocab,
                                     int stride, float softcap, const float* scale_at, float smoothing) {
    T* row = logits + (uint64_t)blockIdx.x * stride;
    if (TASK != COUNTED && targets[blockIdx.x] == NO_TARGET) return clear(row, vocab, losses + blockIdx.x);
    const int target = (int)targets[blockIdx.x], even = vocab & ~7;
    const float scale = TASK == COUNTED ? 0.f : *scale_at;
    const Cap cap = {softcap};
    Running running = Running::none();
    float total = 0.f; // of the logits, for a smoothed target
    for (int i = threadIdx.x * 8; i < even; i += blockDim.x * 8) {
        Eight<T> a;
        a.load(row + i);
        float largest = running.largest;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            a.v[j] = cap.value(a.v[j]);
            largest = fmaxf(largest, a.v[j]);
            if (TASK == SMOOTHED) total += a.v[j];
        }
        running.rise(largest);
#pragma unroll
        for (int j = 0; j < 8; ++j) running.sum += expf(a.v[j] - largest);
    }
    if (even + (int)threadIdx.x < vocab) {
        const float last = cap.value(widen(row[even + threadIdx.x]));
        running.add(last);
        if (TASK == SMOOTHED) total += last;
    }
    // Read before any thread writes: the barrier in the merge lies between.
    const float at_target = cap.value(widen(row[target]));
    running = block_merge(running);
    const float mean = TASK == SMOOTHED ? block_sum(total) / vocab : 0.f;
    const float kept = TASK == SMOOTHED ? 1.f - smoothing : 1.f;
    if (threadIdx.x == 0)
        losses[blockIdx.x] = logf(running.sum) + running.largest - kept * at_target - smoothing * mean;
    if (TASK == COUNTED) {
        hit(row, target, at_target >= running.largest, cap, hits + blockIdx.x);
        return;
    }
    const float factor = scale / running.sum, of_target = scale * kept;
    const float of_all = TASK == SMOOTHED ? scale * smoothing / vocab : 0.f;
    auto slope = [&](float logit, int column) {
        const float capped = cap.value(logit);
        const float gradient = expf(capped - running.largest) * factor - (column == target ? of_target : 0.f);
        return (gradient - of_all) * cap.slope(capped);
    };
    for (int i = threadIdx.x * 8; i < even; i += blockDim.x * 8) {
        Eight<T> a;
        a.load(row + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) a.v[j] = slope(a.v[j], i + j);
        a.store(row + i);
    }
    const int last = even + threadIdx.x;
    if (last < vocab) row[last] = narrow<T>(slope(widen(row[last]), last));
}

#define FOR(T, type)                                                                                              \
    extern "C" __global__ void __launch_bounds__(512)                                                             \
        cross_entropy_rows_##type(T* logits, const uint32_t* targets, float* losses, int vocab, int stride,       \
                                  float softcap, const float* scale) {                                            \
        wait_for_earlier_kernels();                                                                               \
        rows<T, PLAIN>(logits, targets, losses, nullptr, vocab, stride, softcap, scale, 0.f);                     \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(512)                                                             \
        cross_entropy_smooth_##type(T* logits, const uint32_t* targets, float* losses, int vocab, int stride,     \
                                    float softcap, const float* scale, float smoothing) {                         \
        wait_for_earlier_kernels();                                                                               \
        rows<T, SMOOTHED>(logits, targets, losses, nullptr, vocab, stride, softcap, scale, smoothing);            \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(512)                                                             \
        cross_entropy_count_##type(T* logits, const uint32_t* targets, float* losses, float* hits, int vocab,     \
                                   int stride, float softcap) {                                                   \
        wait_for_earlier_kernels();                                                                               \
        rows<T, COUNTED>(logits, targets, losses, hits, vocab, stride, softcap, nullptr, 0.f);                    \
    }
FOR(float, f32)
FOR(bf16, bf16)

// The cap on logits that are sampled from, in place.
extern "C" __global__ void cross_entropy_cap(float* logits, unsigned long long n, float cap) {
    wait_for_earlier_kernels();
    const unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) logits[i] = Cap{cap}.value(logits[i]);
}
