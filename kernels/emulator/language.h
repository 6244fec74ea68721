// CUDA's keywords for a host compiler: qualifiers, vector types, and the arithmetic that a kernel may call.
//
// Functions with a rounding in their names round so here too. Those of the special function unit (__expf, ...) are
// exact here, so a kernel must allow for their error itself.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef __global__ // left unchanged if kernels are searched for by name
#define __global__
#endif
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
// Shared memory must be poisoned and private to a block; a plain variable can be neither.
#define __shared__ static_assert(false, "declare shared memory by SHARED_ARRAY or SHARED_DYN of common.cuh");

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMULATOR_VECTORS(T, base)                                                                   \
    struct alignas(2 * sizeof(T)) base##2 { T x, y; };                                              \
    struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) base##4 { T x, y, z, w; };              \
    inline base##2 make_##base##2(T x, T y) { return {x, y}; }                                      \
    inline base##4 make_##base##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(signed char, char)
EMULATOR_VECTORS(unsigned char, uchar)
EMULATOR_VECTORS(short, short)
EMULATOR_VECTORS(unsigned short, ushort)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
EMULATOR_VECTORS(long long, longlong)
EMULATOR_VECTORS(unsigned long long, ulonglong)
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(double, double)
#undef EMULATOR_VECTORS
struct float3 {
    float x, y, z;
};
struct int3 {
    int x, y, z;
};
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;

// Bit operations.
template <class To, class From>
inline To emulator_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the width");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline float __int_as_float(int x) { return emulator_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulator_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator_bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= ((x >> i) & 1u) << (31 - i);
    return reversed;
}
// Chooses four of the eight bytes in (upper, lower), by one nibble of the selector each. A nibble's top bit
// replicates the sign.
inline unsigned __byte_perm(unsigned lower, unsigned upper, unsigned selector) {
    const uint64_t both = (static_cast<uint64_t>(upper) << 32) | lower;
    unsigned chosen = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned nibble = (selector >> (4 * i)) & 0xf;
        unsigned byte = static_cast<unsigned>(both >> (8 * (nibble & 7))) & 0xff;
        if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
        chosen |= byte << (8 * i);
    }
    return chosen;
}
inline unsigned __funnelshift_l(unsigned lower, unsigned upper, unsigned shift) {
    return static_cast<unsigned>((((static_cast<uint64_t>(upper) << 32) | lower) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned lower, unsigned upper, unsigned shift) {
    return static_cast<unsigned>(((static_cast<uint64_t>(upper) << 32) | lower) >> (shift & 31));
}

// f32 arithmetic with the rounding in the name. g++ does not contract a*b+c here; a kernel that must be exact uses
// these functions on the device.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(nearbyintf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }

// Functions of the special function unit are macros, because glibc declares some of these names itself.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)
#define __tanhf(x) tanhf(x)
#define __fdividef(a, b) ((a) / (b))
#define __frsqrt_rn(x) rsqrtf(x)

template <class T>
inline T emulator_min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T emulator_max(T a, T b) {
    return a < b ? b : a;
}
// CUDA's min and max take mixed integers. Of a NaN and a number they return the number.
template <class A, class B>
inline typename std::common_type<A, B>::type min(A a, B b) {
    typedef typename std::common_type<A, B>::type T;
    if (std::is_floating_point<T>::value) return static_cast<T>(fmin(a, b));
    return emulator_min<T>(static_cast<T>(a), static_cast<T>(b));
}
template <class A, class B>
inline typename std::common_type<A, B>::type max(A a, B b) {
    typedef typename std::common_type<A, B>::type T;
    if (std::is_floating_point<T>::value) return static_cast<T>(fmax(a, b));
    return emulator_max<T>(static_cast<T>(a), static_cast<T>(b));
}

// Ends the kernel, which here ends the process.
inline void __trap() { __builtin_trap(); }

// Loads and stores with cache hints.
template <class T> inline T __ldg(const T* address) { return *address; }
template <class T> inline T __ldcs(const T* address) { return *address; }
template <class T> inline T __ldcg(const T* address) { return *address; }
template <class T> inline void __stcs(T* address, T value) { *address = value; }
template <class T> inline void __stcg(T* address, T value) { *address = value; }
