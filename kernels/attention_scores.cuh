// The parts that both kinds of attention kernels share: the tile that a block takes from its list, the keys that its
// rows see, and the treatment of scores that a thread holds.
//
// A thread's scores lie as the D of mma_m16n8k16, which is also the D of wgmma for each warp: of column block j a lane
// holds [g][2t, 2t+1] and [g+8][the same], with g = lane / 4 and t = lane % 4.
#pragma once
#include "attention_shape.cuh"

// A tile of ROWS rows and its example.
struct Span {
    int from, to, first;
    __device__ __forceinline__ explicit Span(const uint32_t* tiles)
        : from(tiles[3 * blockIdx.y]), to(tiles[3 * blockIdx.y + 1]), first(tiles[3 * blockIdx.y + 2]) {}
    // Whether the tile is padding of a list.
    __device__ __forceinline__ bool is_empty() const { return first >= to; }
};

// The tiles of KEYS keys, counted from the example's beginning, that rows first..end of it see.
struct Keys {
    int lowest, highest;
    __device__ __forceinline__ Keys(const Shape& shape, const Span& span, int end, int keys) {
        const int seen = max(span.from, span.first + 1 - shape.window);
        lowest = span.from + (seen - span.from) / keys * keys;
        highest = span.from + (end - 1 - span.from) / keys * keys;
    }
};

// Whether some, and whether all, of rows first..first+rows see some, or all, of keys key..key+keys.
__device__ __forceinline__ bool some_seen(const Shape& shape, int first, int rows, int key, int keys) {
    return key < first + rows && first - (key + keys - 1) < shape.window;
}
__device__ __forceinline__ bool all_seen(const Shape& shape, int first, int rows, int key, int keys) {
    return key + keys - 1 <= first && first + rows - 1 - key < shape.window;
}

// The slope of a curved score; 0 for a hidden one.
__device__ __forceinline__ float curve_slope(float curved) {
    const float c = fmaxf(curved, -1.f);
    return 1.f - c * c;
}

template <int BANDS, int COLUMNS>
__device__ __forceinline__ void curve_scores(float (&scores)[BANDS][COLUMNS / 8][4], const Shape& shape) {
#pragma unroll
    for (int band = 0; band < BANDS; ++band)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[band][j][e] = shape.curve(scores[band][j][e]);
}

// Sets the scores of rows (bands) and keys (columns) that do not see each other to -infinity. `distance` is that of
// the first row from the first key. Only tiles on the diagonal and at the window's edge need it.
template <int BANDS, int COLUMNS>
__device__ __forceinline__ void hide_keys(float (&scores)[BANDS][COLUMNS / 8][4], int distance, const Shape& shape) {
    const int lane = threadIdx.x & 31, own = distance + (lane >> 2) - (lane & 3) * 2;
#pragma unroll
    for (int band = 0; band < BANDS; ++band)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (!shape.sees(own + band * 16 + e / 2 * 8 - j * 8 - e % 2)) scores[band][j][e] = -INFINITY;
}

// The same for keys (bands) and rows (columns), of which `left` lie before the example's end.
template <int BANDS, int COLUMNS>
__device__ __forceinline__ void hide_rows(float (&scores)[BANDS][COLUMNS / 8][4], int distance, int left, const Shape& shape) {
    const int lane = threadIdx.x & 31, own = distance - (lane >> 2) + (lane & 3) * 2, last = left - (lane & 3) * 2;
#pragma unroll
    for (int band = 0; band < BANDS; ++band)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (!shape.sees(own - band * 16 - e / 2 * 8 + j * 8 + e % 2) || j * 8 + e % 2 >= last)
                    scores[band][j][e] = -INFINITY;
}
