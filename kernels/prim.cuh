// Tensor-core products and shared-memory tiles on the registers of one warp: the few instructions for which CUDA
// C++ has no words.
//
// Every kernel reaches ldmatrix, mma and cp.async through these functions. nvcc makes PTX of them. The emulator
// (emulator/tensor_core.h) runs the same functions on the host, lane by lane, and checks what the hardware leaves
// undefined. All of them need sm_80, and all 32 lanes of the warp must reach them together unless the comment says
// otherwise.
//
// A fragment is the part of a tile that one lane holds. With g = lane / 4 and t = lane % 4 (PTX ISA, "mma.m16n8k16"):
//   A, 16 x 16 bf16, row major: a[0] = A[g][2t, 2t+1], a[1] = A[g+8][same],
//                               a[2] = A[g][2t+8, 2t+9], a[3] = A[g+8][same]
//   B, 16 x 8 bf16:             b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g]
//   D, 16 x 8 f32:              d[0], d[1] = D[g][2t, 2t+1], d[2], d[3] = D[g+8][same]
// The lower index of a pair lies in the lower half of its 32-bit register.
#pragma once

#ifdef CUDA_EMU
#include "emulator/tensor_core.h"
#else
#include <cuda_bf16.h>
#include <stdint.h>

// The address that a shared-memory instruction takes.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Loads one, two or four 8 x 8 matrices of 16-bit values from shared memory. Lane 8 i + j gives the address of row
// j of matrix i (16 bytes, 16-byte aligned). Of matrix i the lane receives [g][2t, 2t+1] in fragment[i]. Lanes
// whose rows are not needed may give the address of any row.
__device__ __forceinline__ void ldmatrix_x1(uint32_t (&fragment)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&fragment)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row)) : "memory");
}

// The same with each matrix transposed: the lane receives [2t, 2t+1][g].
__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&fragment)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&fragment)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row)) : "memory");
}

// Transposes one 8 x 8 matrix of 16-bit values that the warp holds: [g][2t, 2t+1] in, [2t, 2t+1][g] out.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t pair) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
    return transposed;
}

// d += a * b, products exact, sums in f32.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two f32 rounded to nearest even, the first in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float lower, float upper) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
    return pair;
}

// 2^x as the special function unit computes it: 2 ulp; -infinity gives 0.
__device__ __forceinline__ float exp2_approximate(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

// Starts copying 16 bytes from global to shared memory, past L1; both are 16-byte aligned. Each thread calls it for
// itself. The thread that copied sees the bytes after cp_async_wait, the others after a barrier that follows it.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// The same, or 16 zero bytes if the row is outside. `global` is then not read, but must still be aligned.
__device__ __forceinline__ void cp_async_16_or_zero(void* shared, const void* global, bool inside) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(inside ? 16 : 0)
                 : "memory");
}
// Closes the group of copies this thread has started since the last commit. A group may be empty.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `groups` of this thread's latest groups are still in flight.
template <int groups>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}
#endif
