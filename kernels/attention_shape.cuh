// The layout of the heads in the columns of qkv's rows, and the treatment of scores.
#pragma once
#include "common.cuh"

#define LOG2_E 1.44269504088896341f
#define LN_2 0.69314718055994531f

// The layout of the heads in a row of qkv and the treatment of scores, as in `Heads` of src/facts/heads.rs.
struct Shape {
    int rows, columns, heads, group, width;
    int query_at, group_stride, key_at, value_at, key_stride;
    int window;  // INT_MAX: none
    float scale, cap;
    int aligned;

    __device__ __forceinline__ int query_column(int head) const {
        return query_at + head / group * group_stride + head % group * width;
    }
    // Whether a row sees the key that lies `distance` rows before it.
    __device__ __forceinline__ bool sees(int distance) const { return static_cast<unsigned>(distance) < static_cast<unsigned>(window); }
    // Scores, curved if there is a cap, times this factor are exponents of two.
    __device__ __forceinline__ float exponent() const { return (cap > 0.f ? cap : scale) * LOG2_E; }
    // tanh(raw * scale / cap) of a score with a cap. It is computed by its definition, because the hardware's tanh
    // has only three exact digits.
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
