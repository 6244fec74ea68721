// The functions of activations, with their slopes.
#pragma once
#include "common.cuh"

struct Point {
    float value, slope;
};

// x * sigmoid(x)
struct Silu {
    static __device__ __forceinline__ Point at(float x) {
        const float s = 1.f / (1.f + expf(-x));
        return {x * s, s * (1.f + x * (1.f - s))};
    }
};

// x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))
struct GeluTanh {
    static __device__ __forceinline__ Point at(float x) {
        const float root = 0.79788456f, cubic = 0.044715f;
        const float t = tanhf(root * x * (cubic * x * x + 1.f)), half = 0.5f * (1.f + t);
        return {x * half, half + 0.5f * x * (1.f - t * t) * root * (3.f * cubic * x * x + 1.f)};
    }
};

// x times the normal distribution function
struct GeluErf {
    static __device__ __forceinline__ Point at(float x) {
        const float half = 0.5f * (1.f + erff(x * 0.70710678f));
        return {x * half, half + x * expf(-0.5f * x * x) * 0.39894228f};
    }
};
