// The most probable token of each row of logits, one block a row; the twin of src/ops/largest.rs.
#include "common.cuh"

// A logit and its token; none: no number was seen. Of equal logits the lower token is the larger.
struct Best {
    float logit;
    uint32_t token;
    static constexpr uint32_t NONE = 0xffffffffu;
    __device__ __forceinline__ void merge(Best other) {
        const bool better = other.token != NONE
            && (token == NONE || other.logit > logit || (other.logit == logit && other.token < token));
        if (better) *this = other;
    }
};

__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        Best other;
        other.logit = __shfl_xor_sync(0xffffffffu, best.logit, offset);
        other.token = __shfl_xor_sync(0xffffffffu, best.token, offset);
        best.merge(other);
    }
    return best;
}

extern "C" __global__ void __launch_bounds__(512) largest_tokens(const float* logits, uint32_t* tokens, int vocab) {
    wait_for_earlier_kernels();
    SHARED_ARRAY(float, found, 32);
    SHARED_ARRAY(uint32_t, ids, 32);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    logits += (uint64_t)blockIdx.x * vocab;
    Best best = {0.f, Best::NONE};
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        const float logit = logits[i];
        if (isfinite(logit)) best.merge({logit, (uint32_t)i});
    }
    best = warp_best(best);
    if (lane == 0) found[warp] = best.logit, ids[warp] = best.token;
    __syncthreads();
    const bool there = lane < (int)(blockDim.x >> 5);
    best = warp_best({there ? found[lane] : 0.f, there ? ids[lane] : Best::NONE});
    if (threadIdx.x == 0) tokens[blockIdx.x] = best.token;
}
