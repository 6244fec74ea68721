// Causal attention over packed examples, forward and backward, without a score matrix in memory. The twin of
// src/ops/attention.rs.
//
// Scores are computed tile by tile in registers: forward with a running maximum and sum (Milakov and Gimelshein
// 2018), backward from the kept logsumexp (Dao 2022). The backward pass is two kernels: the blocks of one own query
// rows, the blocks of the other own key rows. They compute the scores twice (7 products instead of 5). In return,
// every sum has one writer and one order, without atomics and without a second buffer for the queries' gradient.
//
// A block takes its tile from a list that is made once per batch: (first row of the example, its end, first row of
// the tile), the tiles with the most work first. blockIdx.x is the head, so that neighbouring blocks share keys in
// L2. Scores are scaled to exponents of two.
#include "attention_scores.cuh"
#include "attention_tile.cuh"

// Turns scores into probabilities. The factor of a score's gradient (the probability times the curve's slope) goes
// to the lane's partner. `logs` holds the logsumexps of the columns.
template <bool CURVED, typename T, int BANDS, int COLUMNS>
__device__ __forceinline__ void hand_over(float (&scores)[BANDS][COLUMNS / 8][4], const float (&logs)[COLUMNS / 8][2],
                                          float exponent, T* to) {
#pragma unroll
    for (int band = 0; band < BANDS; ++band)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float slope[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& score = scores[band][j][2 * half + e];
                    const float p = exp2_approximate(fmaf(score, exponent, -logs[j][e] * LOG2_E));
                    slope[e] = CURVED ? p * curve_slope(score) : p;
                    score = p;
                }
                store_pair(to + ((band * (COLUMNS / 8) + j) * 2 + half) * 64, slope[0], slope[1]);
            }
}

// The first `skipped` rows are keys and values only: results of the others begin at `out` and at each head's row of
// `lse`. Rows of `out` lie `stride` apart.
// With two STAGES, the next keys and values come while a block computes with these, and a tile has one barrier instead
// of two. That takes more shared memory.
template <typename T, int WIDTH, int WARPS, int BANDS, int KEYS, int STAGES>
__device__ __forceinline__ void forward(const T* qkv, T* out, float* lse, const uint32_t* tiles, int skipped, int stride,
                                        const Shape shape) {
    constexpr int ROWS = 16 * BANDS * WARPS, THREADS = 32 * WARPS, STRIDE = Tile<T, WIDTH>::STRIDE;
    SHARED_DYN(T, q);
    T *k = q + ROWS * STRIDE, *v = k + STAGES * KEYS * STRIDE;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, head = blockIdx.x;
    float* scratch = reinterpret_cast<float*>(v + STAGES * KEYS * STRIDE) + warp * (16 * BANDS * (KEYS + 4));
    const Span span(tiles);
    if (span.is_empty()) return;
    const int end = min(span.first + ROWS, span.to), own = span.first + warp * 16 * BANDS;
    const Keys keys(shape, span, end, KEYS);
    const int key_head = head / shape.group * shape.key_stride;
    const auto load = [&](T* tile, int column, int key) {
        const T* from = qkv + (uint64_t)key * shape.columns + (column + key_head);
        load_rows<T, WIDTH, KEYS, THREADS>(tile, from, shape.columns, span.to - key, shape.width, shape.aligned);
        cp_async_commit();
    };

    const T* query_head = qkv + (uint64_t)span.first * shape.columns + shape.query_column(head);
    load_rows<T, WIDTH, ROWS, THREADS>(q, query_head, shape.columns, end - span.first, shape.width, shape.aligned);
    load(k, shape.key_at, keys.highest);
    if (STAGES == 2) load(v, shape.value_at, keys.highest);
    const T* own_q = q + warp * 16 * BANDS * STRIDE;
    const float exponent = shape.exponent();
    float sums[BANDS][WIDTH / 8][4] = {}, largest[BANDS][2], total[BANDS][2] = {};
#pragma unroll
    for (int band = 0; band < BANDS; ++band) largest[band][0] = largest[band][1] = -INFINITY;

    const int beyond = own < span.to ? own + 16 * BANDS : 0; // no row of the warp sees keys from here on
    int stage = 0;
    // Goes down from the diagonal, so that nearly no later tile has a new maximum.
    for (int key = keys.highest; key >= keys.lowest; key -= KEYS, stage ^= STAGES - 1) {
        cp_async_wait<0>();
        __syncthreads(); // these keys (and values) have arrived; the last values (and keys) are no longer needed
        if (STAGES == 1) {
            load(v, shape.value_at, key);
        } else if (key > keys.lowest) {
            load(k + (stage ^ 1) * KEYS * STRIDE, shape.key_at, key - KEYS);
            load(v + (stage ^ 1) * KEYS * STRIDE, shape.value_at, key - KEYS);
        }
        const bool sees = key < beyond && own - (key + KEYS - 1) < shape.window;
        float scores[BANDS][KEYS / 8][4];
        if (sees) {
            dot_rows<WIDTH, BANDS, KEYS>(scores, own_q, k + stage * KEYS * STRIDE);
            if (shape.cap > 0.f) curve_scores<BANDS, KEYS>(scores, shape);
            if (!all_seen(shape, own, 16 * BANDS, key, KEYS)) hide_keys<BANDS, KEYS>(scores, own - key, shape);
#pragma unroll
            for (int band = 0; band < BANDS; ++band) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float top = largest[band][half];
#pragma unroll
                    for (int j = 0; j < KEYS / 8; ++j)
                        top = fmaxf(top, fmaxf(scores[band][j][2 * half], scores[band][j][2 * half + 1]));
                    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
                    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
                    // A row that has seen nothing yet keeps -infinity, to which no difference can be taken.
                    const float base = top == -INFINITY ? 0.f : top * exponent;
                    if (__any_sync(0xffffffffu, top > largest[band][half])) {
                        const float shrink = exp2_approximate(fmaf(largest[band][half], exponent, -base));
                        total[band][half] *= shrink;
#pragma unroll
                        for (int j = 0; j < WIDTH / 8; ++j) {
                            sums[band][j][2 * half] *= shrink;
                            sums[band][j][2 * half + 1] *= shrink;
                        }
                    }
                    largest[band][half] = top;
                    float sum = 0.f;
#pragma unroll
                    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                        for (int e = 2 * half; e < 2 * half + 2; ++e) {
                            scores[band][j][e] = exp2_approximate(fmaf(scores[band][j][e], exponent, -base));
                            sum += scores[band][j][e];
                        }
                    total[band][half] += sum;
                }
            }
        }
        if (STAGES == 1) {
            cp_async_wait<0>();
            __syncthreads(); // these values have arrived; the keys are no longer needed
            if (key > keys.lowest) load(k, shape.key_at, key - KEYS);
        }
        if (sees) add_weighted_rows<WIDTH, BANDS, KEYS>(sums, scores, v + stage * KEYS * STRIDE, scratch);
    }

#pragma unroll
    for (int band = 0; band < BANDS; ++band)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = total[band][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const float part = sum > 0.f ? 1.f / sum : 0.f;
#pragma unroll
            for (int j = 0; j < WIDTH / 8; ++j) {
                sums[band][j][2 * half] *= part;
                sums[band][j][2 * half + 1] *= part;
            }
            const int row = own + band * 16 + half * 8 + g;
            if (t == 0 && row < span.to)
                lse[(uint64_t)head * (shape.rows - skipped) + row - skipped] = (largest[band][half] * exponent + log2f(sum)) * LN_2;
        }
    store_rows<T, WIDTH, BANDS>(out + (uint64_t)(own - skipped) * stride + head * shape.width, stride, span.to - own, shape.width,
                                shape.aligned, q + warp * 16 * BANDS * STRIDE, sums);
}

// delta[row] = sum of d_out * out over the head's columns, for the warp's own rows; eight lanes per row. The
// softmax's normalisation subtracts it from the gradient of every score of the row.
template <typename T, int WIDTH, int BANDS>
__device__ __forceinline__ void deltas(const T* out, int stride, const T* d_tile, float* delta, int rows, const Shape& shape) {
    const int lane = threadIdx.x & 31;
#pragma unroll 2
    for (int row = lane >> 3; row < 16 * BANDS; row += 4) {
        float sum = 0.f;
        if (row < rows) {
            const T *y = out + (uint64_t)row * stride, *d = d_tile + row * Tile<T, WIDTH>::STRIDE;
            if (shape.aligned && shape.width % 8 == 0) {
                for (int column = (lane & 7) * 8; column < shape.width; column += 64) {
                    Eight<T> a, b;
                    a.load(y + column);
                    b.load(d + column);
#pragma unroll
                    for (int e = 0; e < 8; ++e) sum += a.v[e] * b.v[e];
                }
            } else {
                for (int column = lane & 7; column < shape.width; column += 8) sum += widen(y[column]) * widen(d[column]);
            }
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 4);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        if ((lane & 7) == 0 && row < rows) delta[row] = sum;
    }
    __syncwarp();
}

// The gradient of the queries, and `delta` [H, T] for the kernel of the keys. Rows of `out` lie `out_stride` apart, and
// rows of `d_qkv` lie `d_stride` apart.
template <typename T, int WIDTH, int WARPS, int BANDS, int KEYS>
__device__ __forceinline__ void backward_query(const T* qkv, const T* out, const T* d_out, const float* lse, float* delta,
                                               T* d_qkv, const uint32_t* tiles, int out_stride, int d_stride, const Shape shape,
                                               const Turn turn) {
    constexpr int ROWS = 16 * BANDS * WARPS, THREADS = 32 * WARPS, STRIDE = Tile<T, WIDTH>::STRIDE;
    SHARED_DYN(T, q);
    T *d = q + ROWS * STRIDE, *k = d + ROWS * STRIDE, *v = k + 2 * KEYS * STRIDE; // two buffers for keys, used in turn
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, head = blockIdx.x;
    float* scratch = reinterpret_cast<float*>(v + KEYS * STRIDE) + warp * (16 * BANDS * (KEYS + 4));
    const Span span(tiles);
    if (span.is_empty()) return;
    const int end = min(span.first + ROWS, span.to), own = span.first + warp * 16 * BANDS;
    const Keys keys(shape, span, end, KEYS);
    const int key_head = head / shape.group * shape.key_stride;
    const auto load = [&](T* tile, int column, int key) {
        const T* from = qkv + (uint64_t)key * shape.columns + (column + key_head);
        load_rows<T, WIDTH, KEYS, THREADS>(tile, from, shape.columns, span.to - key, shape.width, shape.aligned);
        cp_async_commit();
    };

    const int stride = shape.heads * shape.width, column = shape.query_column(head);
    const T* query_head = qkv + (uint64_t)span.first * shape.columns + column;
    const T* d_head = d_out + (uint64_t)span.first * stride + head * shape.width;
    load_rows<T, WIDTH, ROWS, THREADS>(d, d_head, stride, end - span.first, shape.width, shape.aligned);
    cp_async_commit();
    load_rows<T, WIDTH, ROWS, THREADS>(q, query_head, shape.columns, end - span.first, shape.width, shape.aligned);
    load(k, shape.key_at, keys.lowest);
    load(v, shape.value_at, keys.lowest);
    cp_async_wait<2>();
    __syncthreads();
    const uint32_t statistic = static_cast<uint32_t>(head) * shape.rows;
    deltas<T, WIDTH, BANDS>(out + (uint64_t)own * out_stride + head * shape.width, out_stride, d + warp * 16 * BANDS * STRIDE,
                            delta + statistic + own, end - own, shape);
    const T *own_q = q + warp * 16 * BANDS * STRIDE, *own_d = d + warp * 16 * BANDS * STRIDE;
    const float exponent = shape.exponent();
    float sums[BANDS][WIDTH / 8][4] = {};

    const int beyond = own < span.to ? own + 16 * BANDS : 0;
    int stage = 0;
    for (int key = keys.lowest; key <= keys.highest; key += KEYS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads(); // these keys and values have arrived; the last keys are no longer needed
        if (key < keys.highest) load(k + (stage ^ 1) * KEYS * STRIDE, shape.key_at, key + KEYS);
        const bool sees = key < beyond && own - (key + KEYS - 1) < shape.window;
        float scores[BANDS][KEYS / 8][4];
        if (sees) {
            float slopes[BANDS][KEYS / 8][4];
            dot_rows<WIDTH, BANDS, KEYS>(scores, own_q, k + stage * KEYS * STRIDE);
            dot_rows<WIDTH, BANDS, KEYS>(slopes, own_d, v);
            if (shape.cap > 0.f) curve_scores<BANDS, KEYS>(scores, shape);
            if (!all_seen(shape, own, 16 * BANDS, key, KEYS)) hide_keys<BANDS, KEYS>(scores, own - key, shape);
#pragma unroll
            for (int band = 0; band < BANDS; ++band)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    // It is read from L1 each time, because registers are scarcest in this kernel.
                    const int row = own + band * 16 + half * 8 + g;
                    const float log = row < span.to ? lse[statistic + row] * LOG2_E : 0.f;
                    const float pull = row < span.to ? delta[statistic + row] : 0.f;
#pragma unroll
                    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                        for (int e = 2 * half; e < 2 * half + 2; ++e) slopes[band][j][e] -= pull;
                    if (shape.cap > 0.f) {
#pragma unroll
                        for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                            for (int e = 2 * half; e < 2 * half + 2; ++e) slopes[band][j][e] *= curve_slope(scores[band][j][e]);
                    }
#pragma unroll
                    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                        for (int e = 2 * half; e < 2 * half + 2; ++e) {
                            const float p = exp2_approximate(fmaf(scores[band][j][e], exponent, -log));
                            scores[band][j][e] = p * slopes[band][j][e];
                        }
                }
        }
        __syncthreads(); // the values are no longer needed
        if (key < keys.highest) load(v, shape.value_at, key + KEYS);
        if (sees) add_weighted_rows<WIDTH, BANDS, KEYS>(sums, scores, k + stage * KEYS * STRIDE, scratch);
    }

#pragma unroll
    for (int band = 0; band < BANDS; ++band)
#pragma unroll
        for (int j = 0; j < WIDTH / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[band][j][e] *= shape.scale;
    store_rows<T, WIDTH, BANDS>(d_qkv + (uint64_t)own * d_stride + column, d_stride, span.to - own, shape.width,
                                shape.aligned, q + warp * 16 * BANDS * STRIDE, sums, turn.at(own));
}

// The gradients of keys and values. A block owns 16 * BANDS * PAIRS keys of one key head and goes over the query
// rows that see them, for each query head of the group. Warps work in pairs on the same keys. One computes the
// probabilities (k q^T) and from them the values' gradient (p d). The other computes the probabilities' gradient (v
// d^T) and, with its partner's probabilities, the keys' gradient (ds q). So nothing is computed twice, and a warp
// holds one gradient instead of two.
template <typename T, int WIDTH, int PAIRS, int BANDS, int QUERIES>
__device__ __forceinline__ void backward_key(const T* qkv, const T* d_out, const float* lse, const float* delta, T* d_qkv,
                                             const uint32_t* tiles, int d_stride, const Shape shape, const Turn turn) {
    constexpr int KEYS = 16 * BANDS * PAIRS, THREADS = 64 * PAIRS, STRIDE = Tile<T, WIDTH>::STRIDE;
    SHARED_DYN(T, k);
    T *v = k + KEYS * STRIDE, *stages = v + KEYS * STRIDE; // two stages of queries and their gradients
    T* handover = stages + 4 * QUERIES * STRIDE;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, t = lane & 3, key_head = blockIdx.x;
    const int pair = warp % PAIRS;
    const bool for_value = warp < PAIRS;
    float* scratch = reinterpret_cast<float*>(handover + KEYS * QUERIES) + warp * (16 * BANDS * (QUERIES + 4));
    handover += (pair * 16 * BANDS * QUERIES / 2 + lane) * 2;
    const Span span(tiles);
    if (span.is_empty()) return;
    const int key_end = min(span.first + KEYS, span.to), own = span.first + pair * 16 * BANDS;
    // Rows from the first key to the last row whose window reaches the last key.
    const int end = shape.window <= span.to - key_end ? key_end - 1 + shape.window : span.to;
    const int stride = shape.heads * shape.width;
    const auto load = [&](T* stage, int head, int row) {
        const T* query = qkv + (uint64_t)row * shape.columns + shape.query_column(head);
        const T* d = d_out + (uint64_t)row * stride + head * shape.width;
        load_rows<T, WIDTH, QUERIES, THREADS>(stage, query, shape.columns, end - row, shape.width, shape.aligned);
        load_rows<T, WIDTH, QUERIES, THREADS>(stage + QUERIES * STRIDE, d, stride, end - row, shape.width, shape.aligned);
        cp_async_commit();
    };

    const int key_column = shape.key_at + key_head * shape.key_stride, value_column = shape.value_at + key_head * shape.key_stride;
    const uint64_t first = (uint64_t)span.first * shape.columns;
    const int keys = key_end - span.first;
    load_rows<T, WIDTH, KEYS, THREADS>(k, qkv + first + key_column, shape.columns, keys, shape.width, shape.aligned);
    load_rows<T, WIDTH, KEYS, THREADS>(v, qkv + first + value_column, shape.columns, keys, shape.width, shape.aligned);
    load(stages, key_head * shape.group, span.first);
    T* const own_rows = (for_value ? k : v) + pair * 16 * BANDS * STRIDE;
    const float* statistics = for_value ? lse : delta;
    const float exponent = shape.exponent();
    float sums[BANDS][WIDTH / 8][4] = {};

    int row = span.first, head = key_head * shape.group;
    for (int stage = 0; head < (key_head + 1) * shape.group; stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads(); // this stage has arrived; the other one and the handover are no longer needed
        const bool more = row + QUERIES < end;
        const int next_row = more ? row + QUERIES : span.first, next_head = more ? head : head + 1;
        if (next_head < (key_head + 1) * shape.group) load(stages + (stage ^ 1) * 2 * QUERIES * STRIDE, next_head, next_row);
        const T *q = stages + stage * 2 * QUERIES * STRIDE, *d = q + QUERIES * STRIDE;
        const bool sees = own < key_end && some_seen(shape, row, QUERIES, own, 16 * BANDS);
        float values[BANDS][QUERIES / 8][4], statistic[QUERIES / 8][2];
        if (sees) {
#pragma unroll
            for (int j = 0; j < QUERIES / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int at = row + j * 8 + t * 2 + e;
                    statistic[j][e] = at < end ? statistics[(uint64_t)head * shape.rows + at] : 0.f;
                }
            dot_rows<WIDTH, BANDS, QUERIES>(values, own_rows, for_value ? q : d);
            if (for_value) {
                if (shape.cap > 0.f) curve_scores<BANDS, QUERIES>(values, shape);
                if (row + QUERIES > end || !all_seen(shape, row, QUERIES, own, 16 * BANDS))
                    hide_rows<BANDS, QUERIES>(values, row - own, end - row, shape);
                if (shape.cap > 0.f) {
                    hand_over<true, T, BANDS, QUERIES>(values, statistic, exponent, handover);
                } else {
                    hand_over<false, T, BANDS, QUERIES>(values, statistic, exponent, handover);
                }
            }
        }
        __syncthreads();  // the partner has the probabilities
        if (sees) {
            if (!for_value) {
#pragma unroll
                for (int band = 0; band < BANDS; ++band)
#pragma unroll
                    for (int j = 0; j < QUERIES / 8; ++j)
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const float2 slope = load_pair(handover + ((band * (QUERIES / 8) + j) * 2 + half) * 64);
                            values[band][j][2 * half] = slope.x * (values[band][j][2 * half] - statistic[j][0]);
                            values[band][j][2 * half + 1] = slope.y * (values[band][j][2 * half + 1] - statistic[j][1]);
                        }
            }
            add_weighted_rows<WIDTH, BANDS, QUERIES>(sums, values, for_value ? d : q, scratch);
        }
        row = next_row, head = next_head;
    }

    const float factor = for_value ? 1.f : shape.scale;
#pragma unroll
    for (int band = 0; band < BANDS; ++band)
#pragma unroll
        for (int j = 0; j < WIDTH / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[band][j][e] *= factor;
    T* to = d_qkv + (uint64_t)own * d_stride + (for_value ? value_column : key_column);
    store_rows<T, WIDTH, BANDS>(to, d_stride, key_end - own, shape.width, shape.aligned, own_rows, sums,
                                for_value ? Turn{} : turn.at(own));
}

// The rotation that turns the gradients of queries and keys back (`Turn`).
#define TURN_PARAMETERS const float *cosines, const float *sines, int half, int angle_stride
#define TURN \
    Turn { cosines, sines, half, angle_stride }

// Tile sizes: three numbers per kernel, which src/ops/attention/gpu.rs repeats to compute grids and shared memory,
// and the number of blocks per processor that registers are reserved for. No thread spills registers to memory.
// Each block stays within the 99 KiB of shared memory that every card since Ampere has. Only the `wide` ones use
// more, on A100 and H100, and do twice the work per byte read from shared memory.
#define FORWARD(T, type, name, WIDTH, WARPS, BANDS, KEYS, STAGES, BLOCKS)                                              \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                   \
        attention_forward_##name##_##type(const T* qkv, T* out, float* lse, const uint32_t* tiles, int skipped,        \
                                          int stride, SHAPE_PARAMETERS) {                                              \
        wait_for_earlier_kernels();                                                                                    \
        forward<T, WIDTH, WARPS, BANDS, KEYS, STAGES>(qkv, out, lse, tiles, skipped, stride, SHAPE);                   \
    }
#define BACKWARD_QUERY(T, type, WIDTH, WARPS, BANDS, KEYS, BLOCKS)                                                     \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                   \
        attention_backward_query_##WIDTH##_##type(const T* qkv, const T* out, const T* d_out, const float* lse,        \
                                                  float* delta, T* d_qkv, const uint32_t* tiles, int out_stride,       \
                                                  int d_stride, SHAPE_PARAMETERS, TURN_PARAMETERS) {                   \
        wait_for_earlier_kernels();                                                                                    \
        backward_query<T, WIDTH, WARPS, BANDS, KEYS>(qkv, out, d_out, lse, delta, d_qkv, tiles, out_stride, d_stride,  \
                                                     SHAPE, TURN);                                                     \
    }
#define BACKWARD_KEY(T, type, name, WIDTH, PAIRS, BANDS, QUERIES, BLOCKS)                                              \
    extern "C" __global__ void __launch_bounds__(64 * PAIRS, BLOCKS)                                                   \
        attention_backward_key_##name##_##type(const T* qkv, const T* d_out, const float* lse, const float* delta,     \
                                               T* d_qkv, const uint32_t* tiles, int d_stride, SHAPE_PARAMETERS,        \
                                               TURN_PARAMETERS) {                                                      \
        wait_for_earlier_kernels();                                                                                    \
        backward_key<T, WIDTH, PAIRS, BANDS, QUERIES>(qkv, d_out, lse, delta, d_qkv, tiles, d_stride, SHAPE, TURN);    \
    }

FORWARD(bf16, bf16, 32, 32, 4, 2, 64, 1, 2)
FORWARD(bf16, bf16, 64, 64, 4, 2, 64, 1, 2)
FORWARD(bf16, bf16, 64_staged, 64, 4, 2, 64, 2, 2)
FORWARD(bf16, bf16, 96, 96, 4, 2, 64, 1, 2)
FORWARD(bf16, bf16, 96_staged, 96, 4, 2, 64, 2, 2)
FORWARD(bf16, bf16, 128, 128, 4, 2, 64, 1, 2)
FORWARD(bf16, bf16, 256, 256, 4, 1, 64, 1, 2)
BACKWARD_QUERY(bf16, bf16, 32, 4, 2, 32, 2)
BACKWARD_QUERY(bf16, bf16, 64, 4, 2, 32, 2)
BACKWARD_QUERY(bf16, bf16, 96, 4, 2, 32, 2)
BACKWARD_QUERY(bf16, bf16, 128, 4, 2, 32, 2)
BACKWARD_QUERY(bf16, bf16, 256, 4, 1, 16, 2)
BACKWARD_KEY(bf16, bf16, 32, 32, 4, 2, 32, 1)
BACKWARD_KEY(bf16, bf16, 64, 64, 4, 2, 64, 1)
BACKWARD_KEY(bf16, bf16, 96, 96, 4, 2, 32, 1)
BACKWARD_KEY(bf16, bf16, 96_wide, 96, 4, 2, 64, 1)
BACKWARD_KEY(bf16, bf16, 128, 128, 4, 1, 32, 1)
BACKWARD_KEY(bf16, bf16, 128_wide, 128, 4, 2, 32, 1)
BACKWARD_KEY(bf16, bf16, 256, 256, 2, 1, 16, 2)
BACKWARD_KEY(bf16, bf16, 256_wide, 256, 4, 1, 32, 1)

FORWARD(float, f32, 32, 32, 4, 1, 32, 1, 2)
FORWARD(float, f32, 64, 64, 4, 1, 32, 1, 2)
FORWARD(float, f32, 96, 96, 4, 1, 32, 1, 2)
FORWARD(float, f32, 128, 128, 4, 1, 32, 1, 2)
FORWARD(float, f32, 256, 256, 2, 1, 16, 1, 2)
BACKWARD_QUERY(float, f32, 32, 2, 1, 32, 2)
BACKWARD_QUERY(float, f32, 64, 2, 1, 32, 2)
BACKWARD_QUERY(float, f32, 96, 2, 1, 32, 2)
BACKWARD_QUERY(float, f32, 128, 2, 1, 32, 2)
BACKWARD_QUERY(float, f32, 256, 2, 1, 8, 2)
BACKWARD_KEY(float, f32, 32, 32, 2, 1, 32, 2)
BACKWARD_KEY(float, f32, 64, 64, 2, 1, 32, 2)
BACKWARD_KEY(float, f32, 96, 96, 2, 1, 32, 2)
BACKWARD_KEY(float, f32, 128, 128, 2, 1, 16, 2)
BACKWARD_KEY(float, f32, 256, 256, 1, 1, 8, 2)
