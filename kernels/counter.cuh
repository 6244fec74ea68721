// Random numbers from counters: the hash of src/ops/dropout.rs.
#pragma once
#include "common.cuh"

// SplitMix64's output function.
__device__ __forceinline__ unsigned long long mix(unsigned long long value) {
    value += 0x9e3779b97f4a7c15ull;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
    return value ^ (value >> 31);
}
