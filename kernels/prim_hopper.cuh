// The instructions of Hopper (sm_90a) for which CUDA C++ has no words: barriers that count bytes, copies of boxes of a
// tensor, and products of a warpgroup that run beside the threads.
//
// Kernels reach them through these functions. nvcc makes PTX of them; the emulator (emulator/hopper.h) runs the same
// functions on the host and ends the process at what the hardware leaves undefined.
//
// A warpgroup is four warps that follow each other, of which the first has a number divisible by four. It computes
// wgmma.mma_async.m64nNk16: D [64][N] f32 += A [64][16] * B [16][N], bf16. Warp w of it holds rows 16 w to 16 w + 15
// of D, and of A if that lies in registers, as mma_m16n8k16 has them (prim.cuh). So d[0][j][..] are columns 8 j to 8
// j + 7.
//
// In shared memory a matrix lies in panels of rows of 64 or 128 bytes, whose 16-byte pieces are swizzled by the row:
// a copy writes them so, and a product reads them so (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory
// Layout"; CUTLASS, mma_traits_sm90_gmma.hpp, has the layouts as formulas). Panels begin at multiples of 1024 bytes.
#pragma once
#include "prim.cuh"

#ifdef CUDA_EMU
#include "emulator/hopper.h"
#endif

// The exchange of the 16-byte pieces of a panel's rows: address bits 4 to 6 ^= bits 7 to 9 for rows of 128 bytes, bits
// 4 to 5 ^= bits 7 to 8 for rows of 64. The values are those of a matrix descriptor.
enum Swizzle { SWIZZLE_128 = 1, SWIZZLE_64 = 2 };

// Describes a matrix in shared memory by its first element and two distances in bytes. `leading` is the one between
// panels of a matrix that is read across its rows (N-major); for others the hardware ignores it. `stride` is the one
// between groups of eight rows.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* start, uint32_t leading, uint32_t stride, Swizzle swizzle) {
    const uint64_t address = shared_address(start);
    return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
           static_cast<uint64_t>(swizzle) << 62;
}

// The first place of shared memory from here on at which panels may begin.
__device__ __forceinline__ unsigned char* aligned_to_panels(unsigned char* shared) {
    return shared + (-shared_address(shared) & 1023);
}

#ifndef CUDA_EMU
// A map that cuTensorMapEncodeTiled wrote: a kernel's parameter, `const __grid_constant__`.
struct __align__(128) TensorMap {
    unsigned char bytes[128];
};

// Makes a barrier whose phases end with so many arrivals and all bytes that were announced. One thread makes all
// barriers and calls barriers_are_made; then the block meets at __syncthreads.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barriers_are_made() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and announces the bytes that copies will write in this phase.
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity: 0 for the first phase, 1 for the second. For a new barrier, parity 1
// has ended. `patience`: after so many attempts the wait gives up, and results are wrong; 0: never.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity, int patience) {
    int attempts = 0;
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    } while (!done && (patience == 0 || ++attempts < patience));
}

// Starts the copy of a tensor map's box that begins at column x and row y. Elements outside the tensor become zeros.
// One thread calls it; the bytes have arrived when the barrier's phase has ended.
__device__ __forceinline__ void tma_load_2d(void* to, const TensorMap* map, uint64_t* barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
        : "memory");
}

// Orders the thread's own writes to shared memory before later reads by copies and products.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of `threads` threads, whole warps; numbers 1 to 15.
__device__ __forceinline__ void named_barrier(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Registers of a thread from here on, a multiple of 8; every warp of the warpgroup calls it. Those that take wait
// until the others have released enough.
template <int registers>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// Keeps the compiler from moving uses of the registers across this place.
template <int COUNT>
__device__ __forceinline__ void hold(float (&d)[1][COUNT][4]) {
#pragma unroll
    for (int j = 0; j < COUNT; ++j)
        asm volatile("" : "+f"(d[0][j][0]), "+f"(d[0][j][1]), "+f"(d[0][j][2]), "+f"(d[0][j][3])::"memory");
}

// Stands between the threads' own uses of registers and products that use them; names the results that come next.
template <class... Results>
__device__ __forceinline__ void wgmma_fence(Results&... results) {
    (hold(results), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes the group of the products since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `groups` of the latest groups are running; names the results that are complete then.
template <int groups, class... Results>
__device__ __forceinline__ void wgmma_wait(Results&... results) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
    (hold(results), ...);
}

#define WGMMA_D4(j) "+f"(d[0][j][0]), "+f"(d[0][j][1]), "+f"(d[0][j][2]), "+f"(d[0][j][3])
#define WGMMA_D16(j) WGMMA_D4(j), WGMMA_D4(j + 1), WGMMA_D4(j + 2), WGMMA_D4(j + 3)
#define WGMMA_D32 WGMMA_D16(0), WGMMA_D16(4)
#define WGMMA_D48 WGMMA_D32, WGMMA_D16(8)
#define WGMMA_D64 WGMMA_D48, WGMMA_D16(12)
#define WGMMA_D128 WGMMA_D64, WGMMA_D16(16), WGMMA_D16(20), WGMMA_D16(24), WGMMA_D16(28)
#define WGMMA_L32                                                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
    "%25, %26, %27, %28, %29, %30, %31"
#define WGMMA_L48 WGMMA_L32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_L64 WGMMA_L48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_L128                                                                                                         \
    WGMMA_L64                                                                                                              \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, " \
    "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "    \
    "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "   \
    "%127"

// d = a * b, or d += a * b with `accumulate`. Both lie in shared memory with rows along the contraction (K-major): A's
// rows are rows of the product, B's rows are its columns.
#define WGMMA_SS(N, D, LIST, A, B, P)                                                                                     \
    __device__ __forceinline__ void wgmma_ss(float (&d)[1][N / 8][4], uint64_t a, uint64_t b, bool accumulate) {          \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                   \
                     "k16.f32.bf16.bf16 {" LIST "}, " A ", " B ", p, 1, 1, 0, 0;\n}"                                      \
                     : D                                                                                                  \
                     : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                \
    }
WGMMA_SS(64, WGMMA_D32, WGMMA_L32, "%32", "%33", "%34")
WGMMA_SS(128, WGMMA_D64, WGMMA_L64, "%64", "%65", "%66")

// d += a * b. A is the warp's fragment; B lies in shared memory with rows of its columns (N-major).
#define WGMMA_RS(N, D, LIST, A, B)                                                                                        \
    __device__ __forceinline__ void wgmma_rs(float (&d)[1][N / 8][4], const uint32_t (&a)[4], uint64_t b) {               \
        asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N                       \
                     "k16.f32.bf16.bf16 {" LIST "}, {" A "}, " B ", p, 1, 1, 1;\n}"                                       \
                     : D                                                                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                               \
    }
WGMMA_RS(64, WGMMA_D32, WGMMA_L32, "%32, %33, %34, %35", "%36")
WGMMA_RS(96, WGMMA_D48, WGMMA_L48, "%48, %49, %50, %51", "%52")
WGMMA_RS(128, WGMMA_D64, WGMMA_L64, "%64, %65, %66, %67", "%68")
WGMMA_RS(256, WGMMA_D128, WGMMA_L128, "%128, %129, %130, %131", "%132")
#endif
