// Where heads lie in the columns of qkv's rows, and how a score becomes an exponent of two; as `Heads` in src/facts/heads.rs.
#pragma once
#include "common.cuh"

#define LOG2_E 1.44269504088896341f
#define LN_2 0.69314718055994531f

// Where heads lie in a row of qkv, and what is done with a score; as `Heads` in src/ops/attention.rs.
struct Shape {
    int rows, columns, heads, group, width;
    int query_at, group_stride, key_at, value_at, key_stride;
    int window;  // INT_MAX: none
    float scale, cap;
    int aligned;

    __device__ __forceinline__ int query_column(int head) const {
        return query_at + head / group * group_stride + head % group * width;
    }
    // Whether a row sees the key that many rows before it.
    __device__ __forceinline__ bool sees(int distance) const { return static_cast<unsigned>(distance) < static_cast<unsigned>(window); }
    // Scores, curved where there is a cap, times this are exponents of two.
    __device__ __forceinline__ float exponent() const { return (cap > 0.f ? cap : scale) * LOG2_E; }
    // tanh(raw * scale / cap), of scores with a cap. By its definition: the hardware's own tanh is good for three digits.
    __device__ __forceinline__ float curve(float raw) const {
        return 1.f - __fdividef(2.f, exp2_approximate(raw * (2.f * LOG2_E * scale / cap)) + 1.f);
    }
};

#define SHAPE_PARAMETERS                                                                                              \
    int rows, int columns, int heads, int group, int width, int query_at, int group_stride, int key_at, int value_at, \
        int key_stride, int window, float scale, float cap, int aligned
#define SHAPE                                                                                                         \
    Shape {                                                                                                           \
        rows, columns, heads, group, width, query_at, group_stride, key_at, value_at, key_stride, window, scale, cap, \
            aligned                                                                                                   \
    }
