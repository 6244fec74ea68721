// AdamW over one flat buffer and the sums of squares it needs; the twin of src/ops/adamw.rs.
// Sums are taken in double, first by block over a fixed grid, then by one block over the blocks: the same bits each time.
#include "common.cuh"

__device__ __forceinline__ double block_sum_double(double x) {
    SHARED_ARRAY(double, parts, 256);
    parts[threadIdx.x] = x;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
        __syncthreads();
    }
    return parts[0];
}

// One partial sum a block; 256 threads.
extern "C" __global__ void adamw_squares(const float* x, double* partial, unsigned long long n) {
    double sum = 0.0;
    const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step)
        sum += (double)x[i] * (double)x[i];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block: the sum of all partial sums.
extern "C" __global__ void adamw_total(const double* partial, double* total, int count) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += partial[i];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) *total = sum;
}

// The order of operations is torch's. `squares` is the sum of squares of the gradient: it clips to norm_max (0: never),
// and where it is not finite nothing changes. `copy` (may be null) takes the parameters in bf16.
extern "C" __global__ void adamw_step(float* p, const float* g, float* m, float* v, bf16* copy, const double* squares,
                                      unsigned long long n, float norm_max, float decay, float rate, float c1, float b2,
                                      float c2, float root2, float epsilon) {
    const double norm = sqrt(*squares);
    if (!isfinite(norm)) return;
    const double clip = norm_max > 0.f ? (double)norm_max / (norm + 1e-6) : 1.0;
    const float scale = clip < 1.0 ? (float)clip : 1.f;
    const unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float gradient = g[i] * scale;
    const float first = m[i] + (gradient - m[i]) * c1;
    const float second = v[i] * b2 + gradient * gradient * c2;
    const float value = p[i] * decay - rate * first / (sqrtf(second) / root2 + epsilon);
    m[i] = first;
    v[i] = second;
    p[i] = value;
    if (copy) copy[i] = __float2bfloat16_rn(value);
}
