// The basis of every kernel: storage types with f32 arithmetic, sums over a warp and a block.
//
// One source has two compilers: nvcc makes the fatbins, and g++ with -DCUDA_EMU makes the host build that tests run
// (kernels/emulator). A kernel is called {file}_{name}_{f32|bf16} and is launched by the operation of the same name
// in src/ops. Its parameters are pointers, int (32 bits), unsigned long long and float only.
#pragma once
#ifdef CUDA_EMU
#include "emulator/emulator.h"
#else
#include <cuda_bf16.h>
#include <stdint.h>
#define SHARED_ARRAY(T, name, n) __shared__ T name[n]
#define SHARED_DYN(T, name)                                          \
    extern __shared__ __align__(16) unsigned char shared_dynamic[]; \
    T* name = reinterpret_cast<T*>(shared_dynamic)
#endif

#include "prim.cuh"

typedef __nv_bfloat16 bf16;

// The first statement of every kernel, or part of it (`read_ahead_and_wait`): from here on the kernels that were
// launched before have ended, and their writes are seen. On cards of compute capability 9.0 and later a kernel that
// src/ops/cuda/launch.rs launches with programmatic stream serialization may begin while the one before it ends;
// nothing that lies in global memory may be read or written before this call. Parameters may. PTX ISA,
// "griddepcontrol"; CUDA Programming Guide, "Programmatic Dependent Launch".
//
// The instruction waits for the end of the kernel directly before this one. Two rules make it cover all earlier kernels
// too. First, all threads call this function first, also those that return at once, because a grid has ended when all
// its threads have returned, even if the kernels before it have not. Second, a kernel lets the next one begin after its
// own wait, so that a kernel never begins before the one two places ahead has ended. Without the launch attribute, and
// for kernels that nothing follows, both instructions do nothing. Loads by the read-only cache are not bound by the
// wait, so no kernel has them.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#ifdef CUDA_EMU
    emulator::wait_for_earlier_kernels();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The same for a kernel that reads much memory which no kernel writes, such as a weight: it asks the L2 cache for
// `bytes` of it, from `from` on, and then waits. So the memory comes while the kernel before this one ends. A line that
// is asked for is not read: the L2 cache is what all later loads, stores and copies of the device go through, so what a
// load finds behind the wait does not depend on it. All threads call this first. blockDim.y and blockDim.z are 1. PTX
// ISA, "prefetch".
__device__ __forceinline__ void read_ahead_and_wait(const void* from, int64_t bytes) {
#ifdef CUDA_EMU
    emulator::check_ahead(from, bytes);
#else
    constexpr int LINE = 128;
    for (int64_t at = LINE * (int64_t)threadIdx.x; at < bytes; at += LINE * (int64_t)blockDim.x)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(from) + at));
#endif
    wait_for_earlier_kernels();
}

template <typename T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }

// Eight neighbouring values that move in 16-byte accesses. The address must be a multiple of 16 bytes.
template <typename T> struct Eight;
template <> struct Eight<float> {
    float v[8];
    __device__ __forceinline__ void load(const float* from) {
        const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    }
    __device__ __forceinline__ void store(float* to) const {
        reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
        reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
};
template <> struct Eight<bf16> {
    float v[8];
    __device__ __forceinline__ void load(const bf16* from) {
        const uint4 raw = *reinterpret_cast<const uint4*>(from);
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[2 * i] = __uint_as_float(words[i] << 16);
            v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
    __device__ __forceinline__ void store(bf16* to) const {
        *reinterpret_cast<uint4*>(to) = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                                                   pack_bf16(v[6], v[7]));
    }
};

// A warp's values become one by Merge, whose `of` takes two of them, between lanes whose numbers differ by 16, 8, 4, 2
// and 1; every lane gets the result. All lanes take part.
template <typename Merge, typename T>
__device__ __forceinline__ T warp_merged(T x) {
#ifdef CUDA_EMU
    return emulator::merged_warp<Merge>(x, EMULATOR_SITE("a warp's sum"));
#else
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = Merge::of(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
#endif
}

struct Sum {
    template <typename T> static __device__ __forceinline__ T of(T a, T b) { return a + b; }
};
struct Largest {
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};
__device__ __forceinline__ float warp_sum(float x) { return warp_merged<Sum>(x); }
__device__ __forceinline__ float warp_max(float x) { return warp_merged<Largest>(x); }

// The block's values become one by Merge, in a fixed order; every thread gets it. `none` changes no value. blockDim.x
// is a multiple of 32, at most 1024.
template <typename Merge, typename T>
__device__ __forceinline__ T block_merged(T x, T none) {
    SHARED_ARRAY(T, parts, 32);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    x = warp_merged<Merge>(x);
    __syncthreads();  // parts may still be read from an earlier call
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    return warp_merged<Merge>(lane < (int)(blockDim.x >> 5) ? parts[lane] : none);
}
__device__ __forceinline__ float block_sum(float x) { return block_merged<Sum>(x, 0.f); }
__device__ __forceinline__ float block_max(float x) { return block_merged<Largest>(x, -INFINITY); }
