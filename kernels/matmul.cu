// Products of few rows with a large weight, y[M, N] = alpha * x W^T + base; the twin of src/ops/matmul.rs, whose
// products of many rows are a library's. Up to three weights side by side that read the same x are one launch.
//
// Such a product costs the time to read the weight. It is read once, 16 bytes a lane, as it is stored; a 4-bit weight
// is never expanded in memory. The weight is the left side of mma_m16n8k16, x the right one, eight rows of x a tile.
// The order in which k goes through the tensor cores is free as long as both sides have the same: each lane takes the k
// that lie together in memory, so that the loaded values are its fragments, without shared memory. A 4-bit value is
// rounded to bf16 as expanding would.
//
// A block owns 16 * BANDS columns of y. Its warps take groups of 128 k by turns; their sums are added in the order
// of the warps. The order of a sum depends on k alone: a row's bits are the same whatever rows are beside it.
//
// The kernels named `..._adapted` add what adapters make of their rows before a value is rounded. A row without an
// adapter has the bits of the others.
#include "adapters.cuh"
#include "four_bit.cuh"

constexpr int WARPS = 8;
constexpr int GROUP = 128;  // k of a warp at a time

// A lane's part of 128 columns of two rows of a weight, 8 rows apart: 32 values of each, in four pieces of eight. A
// piece has the offset of its eight k in the group, and two A fragments of them. EARLY: the next part is loaded into
// registers of its own while this one is in use, for every number of tiles.
struct FourBit {
    const uint8_t* packed;
    Scales scales;
    const float* values;  // in shared memory
    int width_log2, rows, k;
    static constexpr bool EARLY = true;

    struct Part {
        uint4 words[2];
        float scale[2];
    };
    static __device__ __forceinline__ int first(int t, int piece) { return 32 * t + 8 * piece; }
    __device__ __forceinline__ void load(Part& part, int row, int group, int t) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int own = row + 8 * half, column = group * GROUP + 32 * t;
            part.words[half] = make_uint4(0, 0, 0, 0), part.scale[half] = 0.f;
            if (own < rows && column < k) {
                const uint64_t at = (uint64_t)own * k + column;
                part.words[half] = __ldcs(reinterpret_cast<const uint4*>(packed + at / 2));
                part.scale[half] = scales.at(at >> width_log2);
            }
        }
    }
    __device__ __forceinline__ void fragments(uint32_t (&a)[2][4], const Part& part, int piece) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4& w = part.words[half];
            const uint32_t word = piece == 0 ? w.x : piece == 1 ? w.y : piece == 2 ? w.z : w.w;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                // The first value of a byte is in its high nibble.
                const float left = __fmul_rn(values[word >> (8 * i + 4) & 15], part.scale[half]);
                const float right = __fmul_rn(values[word >> (8 * i) & 15], part.scale[half]);
                a[i / 2][i % 2 * 2 + half] = pack_bf16(left, right);
            }
        }
    }
};

struct Dense {
    const bf16* weight;
    int rows, k;
    static constexpr bool EARLY = false;

    struct Part {
        uint4 words[2][4];
    };
    static __device__ __forceinline__ int first(int t, int piece) { return 32 * piece + 8 * t; }
    __device__ __forceinline__ void load(Part& part, int row, int group, int t) const {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int piece = 0; piece < 4; ++piece) {
                const int own = row + 8 * half, column = group * GROUP + first(t, piece);
                part.words[half][piece] = make_uint4(0, 0, 0, 0);
                if (own < rows && column < k)
                    part.words[half][piece] = __ldcs(reinterpret_cast<const uint4*>(weight + (uint64_t)own * k + column));
            }
    }
    __device__ __forceinline__ void fragments(uint32_t (&a)[2][4], const Part& part, int piece) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4& w = part.words[half][piece];
            a[0][half] = w.x, a[0][2 + half] = w.y, a[1][half] = w.z, a[1][2 + half] = w.w;
        }
    }
};

// TILES tiles of eight rows of x; y's rows and those of `base`, if it is there, are `stride` apart and their
// columns begin at `at`. `added` is Nothing or Added.
template <typename Y, typename Weight, int TILES, int BANDS, typename Beside>
__device__ __forceinline__ void few(const Weight& weight, const bf16* x, Y* y, const Y* base, int m, int stride, int at,
                                    float alpha, const Beside& added) {
    constexpr int ROWS = 16 * BANDS, COLUMNS = 8 * TILES;
    constexpr bool EARLY = Weight::EARLY || TILES < 8;
    SHARED_ARRAY(float, sums, ROWS * COLUMNS);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int own = blockIdx.x * ROWS, groups = (weight.k + GROUP - 1) / GROUP;
    if (own >= weight.rows) return;  // the whole block returns: another weight of this launch is wider
    float total[BANDS][TILES][4] = {};
    typename Weight::Part part[BANDS];
    const auto load = [&](int group) {
#pragma unroll
        for (int band = 0; band < BANDS; ++band) weight.load(part[band], own + band * 16 + g, group, t);
    };
    if (EARLY && warp < groups) load(warp);
    added.find(m, own, min(ROWS, weight.rows - own));
    for (int group = warp; group < groups; group += WARPS) {
        if (!EARLY) load(group);
        typename Weight::Part now[BANDS];
#pragma unroll
        for (int band = 0; band < BANDS; ++band) now[band] = part[band];
        if (EARLY && group + WARPS < groups) load(group + WARPS);
#pragma unroll
        for (int piece = 0; piece < 4; ++piece) {
            const int column = group * GROUP + Weight::first(t, piece);
            uint4 right[TILES];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const int row = tile * 8 + g;
                right[tile] = make_uint4(0, 0, 0, 0);
                if (row < m && column < weight.k)
                    right[tile] = *reinterpret_cast<const uint4*>(x + (uint64_t)row * weight.k + column);
            }
#pragma unroll
            for (int band = 0; band < BANDS; ++band) {
                uint32_t left[2][4];
                weight.fragments(left, now[band], piece);
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    const uint32_t even[2] = {right[tile].x, right[tile].y}, odd[2] = {right[tile].z, right[tile].w};
                    mma_m16n8k16(total[band][tile], left[0], even);
                    mma_m16n8k16(total[band][tile], left[1], odd);
                }
            }
        }
    }
    for (int turn = 0; turn < WARPS; ++turn) {
        if (warp == turn) {
#pragma unroll
            for (int band = 0; band < BANDS; ++band)
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float& sum = sums[(tile * 8 + t * 2 + e % 2) * ROWS + band * 16 + g + e / 2 * 8];
                        sum = turn == 0 ? total[band][tile][e] : sum + total[band][tile][e];
                    }
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < ROWS * COLUMNS; i += 32 * WARPS) {
        const int row = i / ROWS, column = own + i % ROWS;
        if (row >= m || column >= weight.rows) continue;
        const uint64_t to = (uint64_t)row * stride + at + column;
        // nvcc has nothing to fuse here, so that all kernels give a row the same bits.
        const float value = base == nullptr ? __fmul_rn(alpha, sums[i]) : __fmaf_rn(alpha, sums[i], widen(base[to]));
        y[to] = narrow<Y>(added.onto(value, row, column));
    }
}

// Chooses the block's weight among those side by side, by blockIdx.z. Their columns follow each other from `at` on.
#define PICK(name) (blockIdx.z == 0 ? name##_0 : blockIdx.z == 1 ? name##_1 : name##_2)
#define AT (at + (blockIdx.z > 0 ? n_0 : 0) + (blockIdx.z > 1 ? n_1 : 0))
#define FOUR_BIT_PARAMETERS(i) const uint8_t *packed_##i, const uint8_t *codes_##i, const float *absmax_##i, float offset_##i, int n_##i
#define DENSE_PARAMETERS(i) const bf16 *weight_##i, int n_##i

template <typename Y, int TILES, int BANDS, typename Beside>
__device__ __forceinline__ void few_four_bit(const uint8_t* packed, const uint8_t* codes, const float* absmax, float offset,
                                             int n, const bf16* x, Y* y, const Y* base, int m, int k, int stride, int at,
                                             int width_log2, int code, float alpha, const Beside& added) {
    SHARED_ARRAY(float, values, 16);
    SHARED_ARRAY(float, map, 256);
    if (threadIdx.x < 16) values[threadIdx.x] = CODES[code][threadIdx.x];
    if (codes != nullptr) map[threadIdx.x] = dynamic_map(threadIdx.x);
    __syncthreads();
    const FourBit weight = {packed, {codes, absmax, map, offset}, values, width_log2, n, k};
    few<Y, FourBit, TILES, BANDS>(weight, x, y, base, m, stride, at, alpha, added);
}

// The adapters of the step's rows, for the block's weight.
#define ADAPTERS_PARAMETERS                                                                                            \
    const float *low, const uint32_t *items, const uint32_t *rows, int count, int rank_max, float factor, int site_0, \
        int site_1, int site_2
#define ADDED(TILES)                                                                                                \
    SHARED_ARRAY(First, firsts, 8 * TILES);                                                                         \
    const Added<bf16> added = {low + (uint64_t)blockIdx.z * count * rank_max, items, rows, rank_max, PICK(site), \
                               factor, firsts}

// The bytes that a block of `rows_of_block` rows asks for ahead: those of its rows, `row` each, but at most `ahead`.
// They lie together. A block behind the last of n rows has none.
__device__ __forceinline__ int64_t ahead_of_block(int rows_of_block, int n, int64_t row, int ahead) {
    return min((int64_t)ahead, min(rows_of_block, n - (int)blockIdx.x * rows_of_block) * row);
}

// Rows of x up to 8 * TILES. More bands read x less often, fewer make more blocks; no kernel takes more registers
// than there are.
#define FOUR_BIT_OF_ALL                                                                                                     \
    FOUR_BIT_PARAMETERS(0), FOUR_BIT_PARAMETERS(1), FOUR_BIT_PARAMETERS(2), const bf16 *x, bf16 *y, const bf16 *base, int m, \
        int k, int stride, int at, int width_log2, int code, float alpha, int ahead
#define FOUR_BIT_AHEAD(BANDS)                                                \
    PICK(packed) + (int64_t)blockIdx.x * (16 * BANDS) * (k / 2),             \
        ahead_of_block(16 * BANDS, PICK(n), k / 2, ahead)
#define FOUR_BIT_OF_BLOCK                                                                                                \
    PICK(packed), PICK(codes), PICK(absmax), PICK(offset), PICK(n), x, y, base, m, k, stride, AT, width_log2, code, alpha
#define FEW_FOUR_BIT(TILES, BANDS, BLOCKS, ADAPTED_BLOCKS)                                                                              \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                    \
        matmul_few_four_bit_##TILES##_bf16(FOUR_BIT_OF_ALL) {                                                           \
        read_ahead_and_wait(FOUR_BIT_AHEAD(BANDS));                                                                     \
        few_four_bit<bf16, TILES, BANDS>(FOUR_BIT_OF_BLOCK, Nothing());                                                 \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, ADAPTED_BLOCKS)                                                    \
        matmul_few_four_bit_##TILES##_adapted_bf16(FOUR_BIT_OF_ALL, ADAPTERS_PARAMETERS) {                              \
        read_ahead_and_wait(FOUR_BIT_AHEAD(BANDS));                                                                     \
        ADDED(TILES);                                                                                                   \
        few_four_bit<bf16, TILES, BANDS>(FOUR_BIT_OF_BLOCK, added);                                                     \
    }
#define DENSE_OF_ALL(Y)                                                                                              \
    DENSE_PARAMETERS(0), DENSE_PARAMETERS(1), DENSE_PARAMETERS(2), const bf16 *x, Y *y, const Y *base, int m, int k, \
        int stride, int at, float alpha, int ahead
#define DENSE_AHEAD(BANDS)                                       \
    PICK(weight) + (int64_t)blockIdx.x * (16 * BANDS) * k,       \
        ahead_of_block(16 * BANDS, PICK(n), 2 * (int64_t)k, ahead)
#define DENSE_OF_BLOCK Dense{PICK(weight), PICK(n), k}, x, y, base, m, stride, AT, alpha
#define FEW_DENSE(Y, type, TILES, BANDS, BLOCKS)                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) matmul_few_dense_##TILES##_##type(DENSE_OF_ALL(Y)) { \
        read_ahead_and_wait(DENSE_AHEAD(BANDS));                                                                        \
        few<Y, Dense, TILES, BANDS>(DENSE_OF_BLOCK, Nothing());                                                        \
    }
#define FEW_DENSE_ADAPTED(TILES, BANDS, BLOCKS)                                          \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                     \
        matmul_few_dense_##TILES##_adapted_bf16(DENSE_OF_ALL(bf16), ADAPTERS_PARAMETERS) { \
        read_ahead_and_wait(DENSE_AHEAD(BANDS));                                         \
        ADDED(TILES);                                                                    \
        few<bf16, Dense, TILES, BANDS>(DENSE_OF_BLOCK, added);                           \
    }
FEW_FOUR_BIT(1, 1, 2, 3)
FEW_FOUR_BIT(2, 2, 1, 2)
FEW_FOUR_BIT(4, 2, 1, 1)
FEW_FOUR_BIT(8, 2, 1, 1)
FEW_DENSE(bf16, bf16, 1, 1, 2)
FEW_DENSE(bf16, bf16, 2, 2, 1)
FEW_DENSE(bf16, bf16, 4, 1, 1)
FEW_DENSE(bf16, bf16, 8, 1, 1)
FEW_DENSE(float, f32, 1, 1, 2)
FEW_DENSE(float, f32, 2, 2, 1)
FEW_DENSE(float, f32, 4, 1, 1)
FEW_DENSE(float, f32, 8, 1, 1)
FEW_DENSE_ADAPTED(1, 1, 2)
FEW_DENSE_ADAPTED(2, 2, 1)
FEW_DENSE_ADAPTED(4, 1, 1)
FEW_DENSE_ADAPTED(8, 1, 1)
