// LoRA's matrices inside a frozen weight. The twin of src/ops/low_rank.rs.
#include "low_rank.cuh"

// A layer's columns in x, and the ranks of its pair.
struct Part {
    int columns, ranks;
    // Blocks of so many columns that it needs; a layer without a pair needs none.
    __device__ __forceinline__ int strips(int width) const { return ranks > 0 ? (columns + width - 1) / width : 0; }
};

// A pass over x, whose columns belong to three layers with pairs of at most RANKS ranks each. A block takes at most
// COLUMNS columns of one layer in `chunk` rows, in tiles of ROWS rows. It uses each tile twice:
//
//   gradients[blockIdx.y][n][r] = sum over the block's rows t of x[t][n] * low[t][r] * factors[t]
//   through[blockIdx.x][t][r] = sum over the block's columns n of x[t][n] * beside[n][r], if THROUGH
//
// r counts the ranks of the layer's pair, which follow those of the layers before it in the columns of `low` and
// `beside`. `factors` may be null. The partial sums are added up by the kernels below, in order. Every layer's columns
// begin and end at multiples of 16 bytes.
constexpr int ROWS = 64, PASS_THREADS = 256;

template <int RANKS, int COLUMNS, bool THROUGH>
struct PassTiles {
    static constexpr int X = COLUMNS + 8, LOW = RANKS + 8;  // 16 bytes between rows
    static constexpr int BANDS = COLUMNS / 128, BLOCKS = RANKS / 8;
};

template <int RANKS, int COLUMNS, bool THROUGH>
__device__ __forceinline__ void pass_over(const bf16* x, int stride, const bf16* low, int low_stride, const float* factors,
                                          const bf16* beside, int beside_stride, float* gradients, float* through, int rows,
                                          int chunk, const Part (&parts)[3]) {
    typedef PassTiles<RANKS, COLUMNS, THROUGH> Tiles;
    constexpr int X = Tiles::X, LOW = Tiles::LOW, BANDS = Tiles::BANDS, BLOCKS = Tiles::BLOCKS;
    SHARED_DYN(bf16, tiles);  // two stages, used in turn
    bf16 *lows = tiles + 2 * ROWS * X, *weights = lows + 2 * ROWS * LOW;
    float* exchange = reinterpret_cast<float*>(weights + COLUMNS * LOW);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int begin = blockIdx.y * chunk, end = min(rows, begin + chunk);
    const int all = parts[0].columns + parts[1].columns + parts[2].columns;
    // The block's first column, the end of its layer's, and the ranks of that layer's pair.
    int first = 0, columns = 0, ranks = 0;
    int strip = blockIdx.x, column_at = 0, rank_at = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        const int strips = parts[i].strips(COLUMNS);
        if (strip >= 0 && strip < strips) {
            first = column_at + strip * COLUMNS, columns = column_at + parts[i].columns, ranks = parts[i].ranks;
            low += rank_at, beside += rank_at;
        }
        strip -= strips, column_at += parts[i].columns, rank_at += parts[i].ranks;
    }
    const auto load = [&](int stage, int row) {
#pragma unroll 4
        for (int i = threadIdx.x; i < ROWS * COLUMNS / 8; i += PASS_THREADS) {
            const int local = i / (COLUMNS / 8), column = i % (COLUMNS / 8) * 8;
            const bool inside = row + local < end && first + column < columns;
            const bf16* piece = inside ? x + (uint64_t)(row + local) * stride + first + column : x;
            cp_async_16_or_zero(tiles + (stage * ROWS + local) * X + column, piece, inside);
        }
        cp_async_commit();
        for (int i = threadIdx.x; i < ROWS * RANKS; i += PASS_THREADS) {
            const int local = i / RANKS, rank = i % RANKS;
            float value = 0.f;
            if (row + local < end && rank < ranks) {
                value = widen(low[(uint64_t)(row + local) * low_stride + rank]);
                if (factors != nullptr) value *= factors[row + local];
            }
            lows[(stage * ROWS + local) * LOW + rank] = narrow<bf16>(value);
        }
    };
    if (THROUGH) {
        for (int i = threadIdx.x; i < COLUMNS * RANKS; i += PASS_THREADS) {
            const int local = i / RANKS, rank = i % RANKS;
            const bool inside = first + local < columns && rank < ranks;
            weights[local * LOW + rank] =
                inside ? beside[(uint64_t)(first + local) * beside_stride + rank] : narrow<bf16>(0.f);
        }
    }
    load(0, begin);
    float sums[BANDS][BLOCKS][4] = {};
    for (int row = begin, stage = 0; row < end; row += ROWS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile has arrived; the last one is no longer needed
        if (row + ROWS < end) load(stage ^ 1, row + ROWS);
        const bf16 *tile = tiles + stage * ROWS * X, *low_tile = lows + stage * ROWS * LOW;
        const bf16* own = tile + ((lane >> 4) * 8 + (lane & 7)) * X + warp * 16 * BANDS + (lane >> 3 & 1) * 8;
#pragma unroll
        for (int k = 0; k < ROWS; k += 16) {
            uint32_t left[BANDS][4];
#pragma unroll
            for (int band = 0; band < BANDS; ++band) ldmatrix_x4_trans(left[band], own + k * X + band * 16);
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j) {
                uint32_t right[2];
                ldmatrix_x2_trans(right, low_tile + (k + (lane & 15)) * LOW + j * 8);
#pragma unroll
                for (int band = 0; band < BANDS; ++band) mma_m16n8k16(sums[band][j], left[band], right);
            }
        }
        if (THROUGH) {
            // Four bands of rows; two warps each take half of the columns.
            const int band = warp & 3, half = warp >> 2;
            const bf16* row_tile = tile + (band * 16 + (lane & 15)) * X + (lane >> 4) * 8;
            float values[BLOCKS][4] = {};
#pragma unroll
            for (int k = 0; k < COLUMNS / 2; k += 16) {
                const int column = half * (COLUMNS / 2) + k;
                uint32_t left[4];
                ldmatrix_x4(left, row_tile + column);
#pragma unroll
                for (int j = 0; j < BLOCKS; ++j) {
                    uint32_t right[2];
                    ldmatrix_x2_trans(right, weights + (column + (lane & 15)) * LOW + j * 8);
                    mma_m16n8k16(values[j], left, right);
                }
            }
            float* shared = exchange + (band * 16 + g) * RANKS + t * 2;
            if (half == 1) {
#pragma unroll
                for (int j = 0; j < BLOCKS; ++j) {
                    *reinterpret_cast<float2*>(shared + j * 8) = make_float2(values[j][0], values[j][1]);
                    *reinterpret_cast<float2*>(shared + 8 * RANKS + j * 8) = make_float2(values[j][2], values[j][3]);
                }
            }
            __syncthreads();
            if (half == 0) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int at = row + band * 16 + e * 8 + g;
                    if (at >= end) continue;
                    float* to = through + ((uint64_t)blockIdx.x * rows + at) * RANKS + t * 2;
#pragma unroll
                    for (int j = 0; j < BLOCKS; ++j) {
                        const float2 other = *reinterpret_cast<const float2*>(shared + e * 8 * RANKS + j * 8);
                        *reinterpret_cast<float2*>(to + j * 8) =
                            make_float2(values[j][2 * e] + other.x, values[j][2 * e + 1] + other.y);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int band = 0; band < BANDS; ++band)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int column = first + (warp * BANDS + band) * 16 + e * 8 + g;
            if (column >= columns) continue;
            float* to = gradients + ((uint64_t)blockIdx.y * all + column) * RANKS + t * 2;
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j)
                *reinterpret_cast<float2*>(to + j * 8) = make_float2(sums[band][j][2 * e], sums[band][j][2 * e + 1]);
        }
}

// A pair's gradient: its address, the layer's rows (B) and the pair's rank, and the factor on the sum.
struct Gradient {
    float* to;
    int rows, rank;
    float factor;
};

// Adds up what `pass_over` with strips of `width` columns left over dy, in the order of its blocks. The first blocks
// write V, eight values a thread: a rank's column of row t is the sum over its layer's strips of through[strip][t][r],
// and columns of no rank are zero. The others add the gradients of B: a thread takes eight ranks of a row n, the sum
// over `chunks` of gradients[chunk][n][r].
__device__ __forceinline__ void sum_over(const float* through, int width, bf16* v, int stride, int spare, int rows,
                                         const float* gradients, int chunks, int ranks, const Gradient (&pairs)[3]) {
    const int groups = spare / 8, blocks = ((uint64_t)rows * groups + blockDim.x - 1) / blockDim.x;
    if ((int)blockIdx.x < blocks) {
        const unsigned item = blockIdx.x * blockDim.x + threadIdx.x;
        const int row = item / groups, column = (item - row * groups) * 8;
        if (row >= rows) return;
        Eight<bf16> sum = {};
        int strip = 0, first = 0;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            const int strips = Part{pairs[i].rows, pairs[i].rank}.strips(width);
            if (column < first + pairs[i].rank && column + 8 > first) {
                for (const int end = strip + strips; strip < end; ++strip) {
                    const float* part = through + ((uint64_t)strip * rows + row) * ranks;
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        const int at = column + j - first;
                        if (at >= 0 && at < pairs[i].rank) sum.v[j] += part[at];
                    }
                }
            } else {
                strip += strips;
            }
            first += pairs[i].rank;
        }
        sum.store(v + (uint64_t)row * stride + column);
        return;
    }
    const int columns = pairs[0].rows + pairs[1].rows + pairs[2].rows;
    const unsigned item = (blockIdx.x - blocks) * blockDim.x + threadIdx.x, eights = ranks / 8;
    const int n = item / eights, rank = (item - n * eights) * 8;
    if (n >= columns) return;
    int local = n;
    Gradient own = {};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        if (local >= 0 && local < pairs[i].rows) own = pairs[i], own.rows = local;
        local -= pairs[i].rows;
    }
    if (rank >= own.rank) return;
    Eight<float> sum = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
        Eight<float> part;
        part.load(gradients + ((uint64_t)chunk * columns + n) * ranks + rank);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum.v[j] += part.v[j];
    }
    float* to = own.to + (uint64_t)own.rows * own.rank + rank;
#pragma unroll
    for (int j = 0; j < 8; ++j)
        if (rank + j < own.rank) to[j] += sum.v[j] * own.factor;
}

// Adds up what `pass_over` left over x to the gradients of A [rank, columns], times `weight` of the column if it is not
// null. blockIdx.y is the rank among those of all pairs.
__device__ __forceinline__ void sum_below(const float* gradients, int chunks, int ranks, int columns, const float* weight,
                                          const Gradient (&pairs)[3]) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    float sum = 0.f;
    for (int chunk = 0; chunk < chunks; ++chunk) sum += gradients[((uint64_t)chunk * columns + column) * ranks + blockIdx.y];
    if (weight != nullptr) sum *= weight[column];
    int rank = blockIdx.y;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        if (rank >= 0 && rank < pairs[i].rank) pairs[i].to[(uint64_t)rank * columns + column] += sum * pairs[i].factor;
        rank -= pairs[i].rank;
    }
}

#define FOR(T, type)                                                                                       \
    extern "C" __global__ void low_rank_insert_##type(T* out, int cols, int spare, PAIR_PARAMETERS(T)) { \
        wait_for_earlier_kernels();                                                                      \
        const Pair<T> pairs[3] = PAIRS;                                                                    \
        insert<T>(out, cols, spare, pairs, blockIdx.x);                                                    \
    }
FOR(float, f32)
FOR(bf16, bf16)

// Tiles of each number of ranks: src/ops/low_rank.rs repeats the columns.
#define PASS(RANKS, COLUMNS)                                                                                           \
    extern "C" __global__ void __launch_bounds__(PASS_THREADS)                                                         \
        low_rank_gradient_##RANKS##_bf16(const bf16* x, int stride, int columns, const bf16* low, int low_stride,      \
                                         int ranks, const float* factors, float* gradients, int rows, int chunk) {     \
        wait_for_earlier_kernels();                                                                                    \
        const Part parts[3] = {{columns, ranks}, {0, 0}, {0, 0}};                                                      \
        pass_over<RANKS, COLUMNS, false>(x, stride, low, low_stride, factors, nullptr, 0, gradients, nullptr, rows,    \
                                         chunk, parts);                                                                \
    }
#define BOTH(RANKS, COLUMNS)                                                                                           \
    extern "C" __global__ void __launch_bounds__(PASS_THREADS)                                                         \
        low_rank_both_##RANKS##_bf16(const bf16* x, int stride, const bf16* low, int low_stride, const bf16* beside,   \
                                     int beside_stride, float* gradients, float* through, int rows, int chunk,         \
                                     int columns0, int ranks0, int columns1, int ranks1, int columns2, int ranks2) {   \
        wait_for_earlier_kernels();                                                                                    \
        const Part parts[3] = {{columns0, ranks0}, {columns1, ranks1}, {columns2, ranks2}};                            \
        pass_over<RANKS, COLUMNS, true>(x, stride, low, low_stride, nullptr, beside, beside_stride, gradients,         \
                                        through, rows, chunk, parts);                                                  \
    }
PASS(8, 256)
PASS(16, 256)
PASS(32, 128)
PASS(64, 128)
BOTH(8, 256)
BOTH(16, 256)

extern "C" __global__ void low_rank_sum_over_bf16(const float* through, int width, bf16* v, int stride, int spare,
                                                  int rows, const float* gradients, int chunks, int ranks, float* to0,
                                                  int rows0, int rank0, float factor0, float* to1, int rows1, int rank1,
                                                  float factor1, float* to2, int rows2, int rank2, float factor2) {
    wait_for_earlier_kernels();
    const Gradient pairs[3] = {{to0, rows0, rank0, factor0}, {to1, rows1, rank1, factor1}, {to2, rows2, rank2, factor2}};
    sum_over(through, width, v, stride, spare, rows, gradients, chunks, ranks, pairs);
}
extern "C" __global__ void low_rank_sum_below(const float* gradients, int chunks, int ranks, int columns,
                                              const float* weight, float* to0, int rows0, int rank0, float factor0,
                                              float* to1, int rows1, int rank1, float factor1, float* to2, int rows2,
                                              int rank2, float factor2) {
    wait_for_earlier_kernels();
    const Gradient pairs[3] = {{to0, rows0, rank0, factor0}, {to1, rows1, rank1, factor1}, {to2, rows2, rank2, factor2}};
    sum_below(gradients, chunks, ranks, columns, weight, pairs);
}
