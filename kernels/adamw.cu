// One AdamW update of all parameters, clipped by a norm that stays on the device. The twin of src/ops/adamw.rs.
#include "common.cuh"

struct Numbers {
    float c1, beta2, c2, decay, rate, root2, epsilon, clip;
};

__device__ __forceinline__ void update(float& p, float g, float& m, float& v, const Numbers& k) {
    g *= k.clip;
    m += (g - m) * k.c1;
    v = v * k.beta2 + g * g * k.c2;
    p = p * k.decay - k.rate * m / (sqrtf(v) / k.root2 + k.epsilon);
}

// The factor on the gradient, as torch clips: 1 without a limit (0), negative if the sum is not finite. One thread
// per block computes it, because f64 is slow on graphics GPUs.
__device__ __forceinline__ float clipping(const double* squares, float norm_max) {
    if (!(*squares < (double)INFINITY)) return -1.f;
    return norm_max > 0.f ? (float)fmin(1., (double)norm_max / (sqrt(*squares) + 1e-6)) : 1.f;
}

// A thread handles four neighbouring parameters. `copy`, if given, receives the parameters rounded to bf16, for
// products. If the sum of squares is not finite, nothing changes, so that the host can read the sum later and stop.
extern "C" __global__ void adamw_step(float* params, const float* grads, float* first, float* second, bf16* copy,
                                      const double* squares, float norm_max, float c1, float beta2, float c2,
                                      float decay, float rate, float root2, float epsilon, unsigned long long n) {
    wait_for_earlier_kernels();
    SHARED_ARRAY(float, clip, 1);
    if (threadIdx.x == 0) *clip = clipping(squares, norm_max);
    __syncthreads();
    if (*clip < 0.f) return;
    const Numbers k = {c1, beta2, c2, decay, rate, root2, epsilon, *clip};
    const unsigned long long i = ((unsigned long long)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i + 4 <= n) {
        float4 p = *reinterpret_cast<float4*>(params + i);
        const float4 g = *reinterpret_cast<const float4*>(grads + i);
        float4 m = *reinterpret_cast<float4*>(first + i), v = *reinterpret_cast<float4*>(second + i);
        update(p.x, g.x, m.x, v.x, k);
        update(p.y, g.y, m.y, v.y, k);
        update(p.z, g.z, m.z, v.z, k);
        update(p.w, g.w, m.w, v.w, k);
        *reinterpret_cast<float4*>(params + i) = p;
        *reinterpret_cast<float4*>(first + i) = m;
        *reinterpret_cast<float4*>(second + i) = v;
        if (copy != nullptr)
            *reinterpret_cast<uint2*>(copy + i) = make_uint2(pack_bf16(p.x, p.y), pack_bf16(p.z, p.w));
        return;
    }
    for (unsigned long long j = i; j < n; ++j) {
        update(params[j], grads[j], first[j], second[j], k);
        if (copy != nullptr) copy[j] = narrow<bf16>(params[j]);
    }
}
