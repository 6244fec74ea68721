// Sums that become one number and stay on the device. The twin of src/ops/number.rs. They are taken in f64 and in a
// fixed order, so a sum depends neither on the GPU's size nor on the schedule of its blocks.
#include "common.cuh"

// The sum over the block; every thread gets it. blockDim.x is a power of two, at most 1024.
__device__ __forceinline__ double block_total(double x) {
    SHARED_ARRAY(double, parts, 1024);
    parts[threadIdx.x] = x;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    __syncthreads();
    return parts[0];
}

// parts[block] = sum of squares of the values `blockIdx.x * share .. + share`. `share` is a multiple of 4, so that
// reads take 16 bytes.
extern "C" __global__ void number_squares(const float* x, double* parts, unsigned long long n, int share) {
    wait_for_earlier_kernels();
    const unsigned long long from = (unsigned long long)blockIdx.x * share;
    const int count = n - from < (unsigned long long)share ? (int)(n - from) : share;
    x += from;
    double sum = 0.;
    for (int i = threadIdx.x * 4; i + 4 <= count; i += blockDim.x * 4) {
        const float4 v = *reinterpret_cast<const float4*>(x + i);
        sum += (double)v.x * v.x + (double)v.y * v.y + (double)v.z * v.z + (double)v.w * v.w;
    }
    if ((int)threadIdx.x < count % 4) {
        const double v = x[count - 1 - threadIdx.x];
        sum += v * v;
    }
    sum = block_total(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// total += sum of x; one block.
template <typename T>
__device__ __forceinline__ void total(const T* x, int n, double* total) {
    double sum = 0.;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += (double)x[i];
    sum = block_total(sum);
    if (threadIdx.x == 0) *total += sum;
}

extern "C" __global__ void number_total_f32(const float* x, int n, double* to) {
    wait_for_earlier_kernels();
    total(x, n, to);
}
extern "C" __global__ void number_total_f64(const double* x, int n, double* to) {
    wait_for_earlier_kernels();
    total(x, n, to);
}

// to[0] + to[1] = x to 48 bits. The rest of a number that is not finite is 0.
template <typename T>
__device__ __forceinline__ void split(const T* x, float* to) {
    const double value = (double)x[0];
    const float whole = (float)value;
    const float rest = (float)(value - (double)whole);
    to[0] = whole;
    to[1] = rest - rest == 0.f ? rest : 0.f;
}

extern "C" __global__ void number_split_f32(const float* x, float* to) {
    wait_for_earlier_kernels();
    split(x, to);
}
extern "C" __global__ void number_split_f64(const double* x, float* to) {
    wait_for_earlier_kernels();
    split(x, to);
}
