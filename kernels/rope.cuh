// The rotation of a pair of values, wherever it happens.
#pragma once
#include "common.cuh"

__device__ __forceinline__ void turn_pair(float& a, float& b, float cosine, float sine) {
    const float left = a, right = b;
    a = left * cosine - right * sine;
    b = right * cosine + left * sine;
}
