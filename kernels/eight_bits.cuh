// A number in 8 bits: E4M3, a sign, four bits of exponent and three of fraction. The twin of
// src/ops/eight_bits.rs. The architectures of before 8.9 have no instruction for it, so that it is
// made of integers on all.
#pragma once
#include "common.cuh"

struct fp8 {
    uint8_t bits;
};

__device__ __forceinline__ float widen(fp8 x) {
    const uint32_t bits = x.bits;
    // As an f32 the exponent is 120 too small; numbers without a leading one become such by the product.
    const float scale = (bits & 0x7fu) == 0x7fu ? __uint_as_float(0x7fc00000u) : 1.329227995784916e36f;
    return __uint_as_float((bits & 0x80u) << 24 | (bits & 0x7fu) << 20) * scale;
}

// The nearest number, of two the one with the even fraction; beyond 448 it is 448, and a NaN stays one.
template <> __device__ __forceinline__ fp8 narrow<fp8>(float x) {
    const uint32_t sign = __float_as_uint(x) >> 24 & 0x80u;
    const float size = fabsf(x);
    uint32_t bits;
    if (!(size == size)) {
        bits = 0x7fu;
    } else if (size < 0.015625f) {
        bits = (uint32_t)__float2int_rn(size * 512.f);
    } else {
        bits = __float_as_uint(fminf(size, 448.f));
        bits = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
    }
    return fp8{(uint8_t)(sign | bits)};
}

// Eight bytes at once; the address is a multiple of eight.
template <> struct Eight<fp8> {
    float v[8];
    __device__ __forceinline__ void load(const fp8* from) {
        const uint2 raw = *reinterpret_cast<const uint2*>(from);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = widen(fp8{(uint8_t)((i < 4 ? raw.x : raw.y) >> 8 * (i % 4))});
    }
    __device__ __forceinline__ void store(fp8* to) const {
        uint2 raw = make_uint2(0u, 0u);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            raw.x |= (uint32_t)narrow<fp8>(v[i]).bits << 8 * i;
            raw.y |= (uint32_t)narrow<fp8>(v[4 + i]).bits << 8 * i;
        }
        *reinterpret_cast<uint2*>(to) = raw;
    }
};
