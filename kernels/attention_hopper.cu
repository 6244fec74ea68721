// Causal attention on Hopper (sm_90a) by products of warpgroups. It computes the same as attention.cu, for bf16 heads
// of 64, 96 and 128 columns (256 in the forward pass) without a soft cap. src/ops/attention/hopper.rs launches them.
//
// A block has two warpgroups, of 64 rows each, and a third that gives its registers to them: one of its warps starts
// copies. Boxes of qkv and d_out come by TMA into stages; two barriers of a stage say that it is full and that it is
// empty. A tile of rows lies in panels of 64 columns (of 32 for 96 columns), swizzled.
//
// As in attention.cu the backward pass is two kernels, so that each sum has one writer and one order. Probabilities
// and gradients of scores stay in the registers of the warp that computed them: they are the left operand of its next
// product.
//
// Rows of a box behind an example are another example's. Their probability is 0, so they add nothing as long as they
// are finite. Rows behind the last example are zeros.
#include "attention_scores.cuh"
#include "attention_tile.cuh"
#include "prim_hopper.cuh"

constexpr int GROUPS = 2;             // warpgroups of a block
constexpr int OWN_ROWS = 64;          // rows of a warpgroup
constexpr int ROWS = GROUPS * OWN_ROWS;
constexpr int STAGES = 2;
constexpr int THREADS = 128 * (GROUPS + 1);
// Registers of a thread that copies and of one that computes: three warpgroups share 64 Ki registers.
constexpr int COPYING = 24, COMPUTING = 240;

// The layout of a tile of ROWS rows in shared memory.
template <int WIDTH, int ROWS>
struct Box {
    static constexpr int COLUMNS = WIDTH % 64 == 0 ? 64 : 32; // of a panel
    static constexpr int ROW = 2 * COLUMNS, PANEL = ROWS * ROW, BYTES = ROWS * WIDTH * 2;
    static constexpr Swizzle SWIZZLE = COLUMNS == 64 ? SWIZZLE_128 : SWIZZLE_64;

    // Starts the copy of the rows that begin at `row`. A copy takes 64 rows of a panel.
    static __device__ __forceinline__ void load(unsigned char* tile, const TensorMap* map, uint64_t* full, int column, int row) {
#pragma unroll
        for (int panel = 0; panel < WIDTH / COLUMNS; ++panel)
#pragma unroll
            for (int first = 0; first < ROWS; first += 64)
                tma_load_2d(tile + panel * PANEL + first * ROW, map, full, column + panel * COLUMNS, row + first);
    }
    // Columns 16 k to 16 k + 15 of all rows, as an operand whose rows lie along the contraction.
    static __device__ __forceinline__ uint64_t columns(const unsigned char* tile, int k) {
        return matrix_descriptor(tile + 16 * k / COLUMNS * PANEL + 16 * k % COLUMNS * 2, 16, 8 * ROW, SWIZZLE);
    }
    // Rows 16 k to 16 k + 15 with all columns, as a right operand whose contraction is over the rows.
    static __device__ __forceinline__ uint64_t rows(const unsigned char* tile, int k) {
        return matrix_descriptor(tile + 16 * k * ROW, PANEL, 8 * ROW, SWIZZLE);
    }
};

// Bytes of a warpgroup's own tile: later its results lie there, with 16 bytes between rows.
template <int WIDTH>
constexpr int OWN_BYTES = OWN_ROWS * (2 * WIDTH + 16);

// c = a b^T for 64 rows of `a` and COLUMNS rows of `b`.
template <int WIDTH, int COLUMNS>
__device__ __forceinline__ void start_dots(float (&c)[1][COLUMNS / 8][4], const unsigned char* a, const unsigned char* b) {
#pragma unroll
    for (int k = 0; k < WIDTH / 16; ++k)
        wgmma_ss(c, Box<WIDTH, OWN_ROWS>::columns(a, k), Box<WIDTH, COLUMNS>::columns(b, k), k > 0);
    wgmma_commit();
}

// c += weights b for the ROWS rows of `b`.
template <int WIDTH, int ROWS>
__device__ __forceinline__ void start_weighted_rows(float (&c)[1][WIDTH / 8][4], const uint32_t (&weights)[ROWS / 16][4],
                                                    const unsigned char* b) {
#pragma unroll
    for (int k = 0; k < ROWS / 16; ++k) wgmma_rs(c, weights[k], Box<WIDTH, ROWS>::rows(b, k));
    wgmma_commit();
}

// A warp's results, rounded, as the left operand of its next product.
template <int COLUMNS>
__device__ __forceinline__ void pack(uint32_t (&weights)[COLUMNS / 16][4], const float (&values)[1][COLUMNS / 8][4]) {
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float(&pairs)[4] = values[0][2 * k + e / 2];
            weights[k][e] = pack_bf16(pairs[e % 2 * 2], pairs[e % 2 * 2 + 1]);
        }
}

// The place of a thread in its block.
struct Place {
    int warp, lane, group, warp_of_group;
    __device__ __forceinline__ Place() : warp(threadIdx.x >> 5), lane(threadIdx.x & 31), group(warp / 4), warp_of_group(warp % 4) {}
    // Whether the thread's warpgroup only copies. Registers are dealt out anew on the way.
    __device__ __forceinline__ bool copies() const {
        if (group == GROUPS) release_registers<COPYING>();
        else take_registers<COMPUTING>();
        return group == GROUPS;
    }
};

// The barriers of a pipeline with STAGES stages. A stage and the parity of its phases follow from the number of the
// turn.
struct Stages {
    uint64_t *full, *empty;
    int patience;
    __device__ __forceinline__ static int stage(int turn) { return turn % STAGES; }
    __device__ __forceinline__ void wait_full(int turn) const { barrier_wait(full + stage(turn), turn / STAGES & 1, patience); }
    __device__ __forceinline__ void wait_empty(int turn) const { barrier_wait(empty + stage(turn), (turn / STAGES & 1) ^ 1, patience); }
    // A warp says that it needs the stage no longer.
    __device__ __forceinline__ void release(int turn, int lane) const {
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + stage(turn));
    }
    __device__ __forceinline__ void init(int arrivals, int warps) const {
        for (int i = 0; i < STAGES; ++i) barrier_init(full + i, arrivals), barrier_init(empty + i, warps);
    }
};

// Turns scores into weights that belong to the largest score so far, and updates it and the sums of weights. `shrink`
// is the factor by which earlier sums become smaller. Every value of `scores` is used once.
template <int KEYS>
__device__ __forceinline__ void soften(float (&scores)[1][KEYS / 8][4], float (&largest)[2], float (&total)[2], float (&shrink)[2],
                                       float exponent) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float top = largest[half];
#pragma unroll
        for (int j = 0; j < KEYS / 8; ++j) top = fmaxf(top, fmaxf(scores[0][j][2 * half], scores[0][j][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        // A row that has seen nothing yet keeps -infinity, to which no difference can be taken.
        const float base = top == -INFINITY ? 0.f : top * exponent;
        shrink[half] = exp2_approximate(fmaf(largest[half], exponent, -base));
        largest[half] = top;
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
                scores[0][j][e] = exp2_approximate(fmaf(scores[0][j][e], exponent, -base));
                sum += scores[0][j][e];
            }
        total[half] = total[half] * shrink[half] + sum;
    }
}

// Values of the next tile's scores are computed while the last tile's weights are multiplied by its values.
template <int WIDTH, int KEYS>
__device__ __forceinline__ void forward(const TensorMap& rows, bf16* out, float* lse, const uint32_t* tiles, int stride, int patience,
                                        const Shape& shape) {
    typedef Box<WIDTH, OWN_ROWS> Own;
    typedef Box<WIDTH, KEYS> Key;
    SHARED_DYN(unsigned char, unaligned);
    SHARED_ARRAY(uint64_t, barriers, 1 + 4 * STAGES);
    unsigned char *const own_tiles = aligned_to_panels(unaligned), *const key_tiles = own_tiles + GROUPS * OWN_BYTES<WIDTH>;
    unsigned char* const value_tiles = key_tiles + STAGES * Key::BYTES;
    uint64_t* const own_full = barriers;
    const Stages key_stages = {barriers + 1, barriers + 1 + STAGES, patience};
    const Stages value_stages = {barriers + 1 + 2 * STAGES, barriers + 1 + 3 * STAGES, patience};
    const Place place;
    const Span span(tiles);
    if (span.is_empty()) return;
    const int end = min(span.first + ROWS, span.to), head = blockIdx.x;
    const int groups = end - span.first > OWN_ROWS ? GROUPS : 1; // those that have rows
    const Keys keys(shape, span, end, KEYS);
    if (threadIdx.x == 0) {
        barrier_init(own_full, 1);
        key_stages.init(1, 4 * groups);
        value_stages.init(1, 4 * groups);
        barriers_are_made();
    }
    __syncthreads();

    if (place.copies()) {
        if (threadIdx.x != 128 * GROUPS) return;
        const int key_head = head / shape.group * shape.key_stride;
        barrier_arrive_expecting(own_full, groups * Own::BYTES);
        for (int i = 0; i < groups; ++i)
            Own::load(own_tiles + i * OWN_BYTES<WIDTH>, &rows, own_full, shape.query_column(head), span.first + i * OWN_ROWS);
        int turn = 0;
        for (int key = keys.highest; key >= keys.lowest; key -= KEYS, ++turn) {
            const int stage = Stages::stage(turn);
            key_stages.wait_empty(turn);
            barrier_arrive_expecting(key_stages.full + stage, Key::BYTES);
            Key::load(key_tiles + stage * Key::BYTES, &rows, key_stages.full + stage, shape.key_at + key_head, key);
            value_stages.wait_empty(turn);
            barrier_arrive_expecting(value_stages.full + stage, Key::BYTES);
            Key::load(value_tiles + stage * Key::BYTES, &rows, value_stages.full + stage, shape.value_at + key_head, key);
        }
        return;
    }
    if (place.group >= groups) return;

    unsigned char* const own_tile = own_tiles + place.group * OWN_BYTES<WIDTH>;
    const int own = span.first + place.group * OWN_ROWS + place.warp_of_group * 16; // the warp's first row
    const float exponent = shape.exponent();
    float sums[1][WIDTH / 8][4] = {}, scores[1][KEYS / 8][4], largest[2] = {-INFINITY, -INFINITY}, total[2] = {}, shrink[2];
    uint32_t weights[KEYS / 16][4];

    barrier_wait(own_full, 0, patience);
    key_stages.wait_full(0);
    wgmma_fence(scores);
    start_dots<WIDTH, KEYS>(scores, own_tile, key_tiles);
    wgmma_wait<0>(scores);
    key_stages.release(0, place.lane);
    if (!all_seen(shape, own, 16, keys.highest, KEYS)) hide_keys<1, KEYS>(scores, own - keys.highest, shape);
    soften<KEYS>(scores, largest, total, shrink, exponent);
    pack<KEYS>(weights, scores);
    int turn = 0;
    for (int key = keys.highest - KEYS; key >= keys.lowest; key -= KEYS, ++turn) {
        key_stages.wait_full(turn + 1);
        value_stages.wait_full(turn);
        wgmma_fence(scores, sums);
        start_dots<WIDTH, KEYS>(scores, own_tile, key_tiles + Stages::stage(turn + 1) * Key::BYTES);
        start_weighted_rows<WIDTH, KEYS>(sums, weights, value_tiles + Stages::stage(turn) * Key::BYTES);
        wgmma_wait<1>(scores);
        key_stages.release(turn + 1, place.lane);
        if (!all_seen(shape, own, 16, key, KEYS)) hide_keys<1, KEYS>(scores, own - key, shape);
        soften<KEYS>(scores, largest, total, shrink, exponent);
        wgmma_wait<0>(sums);
        value_stages.release(turn, place.lane);
        // Nearly no later tile has a new maximum.
        if (__any_sync(0xffffffffu, shrink[0] < 1.f || shrink[1] < 1.f)) {
#pragma unroll
            for (int j = 0; j < WIDTH / 8; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[0][j][e] *= shrink[e / 2];
        }
        pack<KEYS>(weights, scores);
    }
    value_stages.wait_full(turn);
    wgmma_fence(sums);
    start_weighted_rows<WIDTH, KEYS>(sums, weights, value_tiles + Stages::stage(turn) * Key::BYTES);
    wgmma_wait<0>(sums);

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = total[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float part = sum > 0.f ? 1.f / sum : 0.f;
#pragma unroll
        for (int j = 0; j < WIDTH / 8; ++j) sums[0][j][2 * half] *= part, sums[0][j][2 * half + 1] *= part;
        const int row = own + half * 8 + place.lane / 4;
        if (place.lane % 4 == 0 && row < span.to) {
            lse[(uint64_t)head * shape.rows + row] = (largest[half] * exponent + log2f(sum)) * LN_2;
        }
    }
    named_barrier(1 + place.group, 128); // no warp of the group reads its tile any more
    bf16* const tile = reinterpret_cast<bf16*>(own_tile) + place.warp_of_group * 16 * Tile<bf16, WIDTH>::STRIDE;
    store_rows<bf16, WIDTH, 1>(out + (uint64_t)own * stride + head * WIDTH, stride, span.to - own, WIDTH, true, tile, sums);
}

// delta[row] = sum of d_out * out over the head's columns, for the warp's own rows; eight lanes per row.
template <int WIDTH>
__device__ __forceinline__ void deltas(const bf16* out, int stride, const bf16* d, int d_stride, float* delta, int rows) {
    const int lane = threadIdx.x & 31;
#pragma unroll 2
    for (int row = lane >> 3; row < 16; row += 4) {
        float sum = 0.f;
        for (int column = (lane & 7) * 8; row < rows && column < WIDTH; column += 64) {
            Eight<bf16> a, b;
            a.load(out + (uint64_t)row * stride + column);
            b.load(d + (uint64_t)row * d_stride + column);
#pragma unroll
            for (int e = 0; e < 8; ++e) sum += a.v[e] * b.v[e];
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 4);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        if ((lane & 7) == 0 && row < rows) delta[row] = sum;
    }
    __syncwarp();
}

// The gradient of the queries, and `delta` [H, T] for the kernel of the keys.
template <int WIDTH, int KEYS>
__device__ __forceinline__ void backward_query(const TensorMap& rows, const TensorMap& d_rows, const bf16* out, const bf16* d_out,
                                               const float* lse, float* delta, bf16* d_qkv, const uint32_t* tiles, int out_stride,
                                               int d_stride, int patience, const Shape& shape, const Turn& turn_back) {
    typedef Box<WIDTH, OWN_ROWS> Own;
    typedef Box<WIDTH, KEYS> Key;
    SHARED_DYN(unsigned char, unaligned);
    SHARED_ARRAY(uint64_t, barriers, 1 + 2 * STAGES);
    unsigned char *const query_tiles = aligned_to_panels(unaligned), *const d_tiles = query_tiles + GROUPS * OWN_BYTES<WIDTH>;
    unsigned char *const key_tiles = d_tiles + GROUPS * OWN_BYTES<WIDTH>, *const value_tiles = key_tiles + STAGES * Key::BYTES;
    uint64_t* const own_full = barriers;
    const Stages stages = {barriers + 1, barriers + 1 + STAGES, patience};
    const Place place;
    const Span span(tiles);
    if (span.is_empty()) return;
    const int end = min(span.first + ROWS, span.to), head = blockIdx.x;
    const int groups = end - span.first > OWN_ROWS ? GROUPS : 1;
    const Keys keys(shape, span, end, KEYS);
    if (threadIdx.x == 0) {
        barrier_init(own_full, 1);
        stages.init(1, 4 * groups);
        barriers_are_made();
    }
    __syncthreads();

    const int column = shape.query_column(head);
    if (place.copies()) {
        if (threadIdx.x != 128 * GROUPS) return;
        const int key_head = head / shape.group * shape.key_stride;
        barrier_arrive_expecting(own_full, groups * 2 * Own::BYTES);
        for (int i = 0; i < groups; ++i) {
            Own::load(query_tiles + i * OWN_BYTES<WIDTH>, &rows, own_full, column, span.first + i * OWN_ROWS);
            Own::load(d_tiles + i * OWN_BYTES<WIDTH>, &d_rows, own_full, head * WIDTH, span.first + i * OWN_ROWS);
        }
        int turn = 0;
        for (int key = keys.lowest; key <= keys.highest; key += KEYS, ++turn) {
            const int stage = Stages::stage(turn);
            stages.wait_empty(turn);
            barrier_arrive_expecting(stages.full + stage, 2 * Key::BYTES);
            Key::load(key_tiles + stage * Key::BYTES, &rows, stages.full + stage, shape.key_at + key_head, key);
            Key::load(value_tiles + stage * Key::BYTES, &rows, stages.full + stage, shape.value_at + key_head, key);
        }
        return;
    }
    if (place.group >= groups) return;

    unsigned char* const query_tile = query_tiles + place.group * OWN_BYTES<WIDTH>;
    const unsigned char* const d_tile = d_tiles + place.group * OWN_BYTES<WIDTH>;
    const int group_first = span.first + place.group * OWN_ROWS, own = group_first + place.warp_of_group * 16;
    const uint32_t statistic = static_cast<uint32_t>(head) * shape.rows;
    const int d_columns = shape.heads * WIDTH;
    deltas<WIDTH>(out + (uint64_t)own * out_stride + head * WIDTH, out_stride, d_out + (uint64_t)own * d_columns + head * WIDTH, d_columns,
                  delta + statistic + own, span.to - own);
    float log[2], pull[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = own + half * 8 + place.lane / 4;
        log[half] = row < span.to ? lse[statistic + row] * LOG2_E : 0.f;
        pull[half] = row < span.to ? delta[statistic + row] : 0.f;
    }
    const float exponent = shape.exponent();
    float sums[1][WIDTH / 8][4] = {}, scores[1][KEYS / 8][4], slopes[1][KEYS / 8][4];
    uint32_t weights[KEYS / 16][4];

    barrier_wait(own_full, 0, patience);
    int turn = 0;
    for (int key = keys.lowest; key <= keys.highest; key += KEYS, ++turn) {
        const unsigned char* const key_tile = key_tiles + Stages::stage(turn) * Key::BYTES;
        stages.wait_full(turn);
        if (some_seen(shape, group_first, OWN_ROWS, key, KEYS)) {
            wgmma_fence(scores, slopes);
            start_dots<WIDTH, KEYS>(scores, query_tile, key_tile);
            start_dots<WIDTH, KEYS>(slopes, d_tile, value_tiles + Stages::stage(turn) * Key::BYTES);
            wgmma_wait<1>(scores);
            if (!all_seen(shape, own, 16, key, KEYS)) hide_keys<1, KEYS>(scores, own - key, shape);
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) scores[0][j][e] = exp2_approximate(fmaf(scores[0][j][e], exponent, -log[e / 2]));
            wgmma_wait<0>(slopes);
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) scores[0][j][e] *= slopes[0][j][e] - pull[e / 2];
            pack<KEYS>(weights, scores);
            wgmma_fence(sums);
            start_weighted_rows<WIDTH, KEYS>(sums, weights, key_tile);
            wgmma_wait<0>(sums);
        }
        stages.release(turn, place.lane);
    }

#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[0][j][e] *= shape.scale;
    named_barrier(1 + place.group, 128);
    bf16* const tile = reinterpret_cast<bf16*>(query_tile) + place.warp_of_group * 16 * Tile<bf16, WIDTH>::STRIDE;
    store_rows<bf16, WIDTH, 1>(d_qkv + (uint64_t)own * d_stride + column, d_stride, span.to - own, WIDTH, true, tile, sums,
                               turn_back.at(own));
}

// The gradients of keys and values. A warpgroup owns 64 keys of a key head and goes over the query rows that see
// them, for each query head of the group. It computes the transposed scores, so that keys are the rows of all its
// products.
template <int WIDTH, int QUERIES>
__device__ __forceinline__ void backward_key(const TensorMap& rows, const TensorMap& d_rows, const float* lse, const float* delta,
                                             bf16* d_qkv, const uint32_t* tiles, int d_stride, int patience, const Shape& shape,
                                             const Turn& turn_back) {
    typedef Box<WIDTH, OWN_ROWS> Own;
    typedef Box<WIDTH, QUERIES> Query;
    SHARED_DYN(unsigned char, unaligned);
    SHARED_ARRAY(uint64_t, barriers, 1 + 2 * STAGES);
    // The rows' statistics of each stage: logsumexps as exponents of two, then deltas.
    SHARED_ARRAY(float, statistics, STAGES * 2 * QUERIES);
    unsigned char *const key_tiles = aligned_to_panels(unaligned), *const value_tiles = key_tiles + GROUPS * OWN_BYTES<WIDTH>;
    unsigned char *const query_tiles = value_tiles + GROUPS * OWN_BYTES<WIDTH>, *const d_tiles = query_tiles + STAGES * Query::BYTES;
    uint64_t* const own_full = barriers;
    const Stages stages = {barriers + 1, barriers + 1 + STAGES, patience};
    const Place place;
    const Span span(tiles);
    if (span.is_empty()) return;
    const int key_end = min(span.first + ROWS, span.to), key_head = blockIdx.x;
    const int groups = key_end - span.first > OWN_ROWS ? GROUPS : 1;
    // Rows from the first key to the last row whose window reaches the last key.
    const int end = shape.window <= span.to - key_end ? key_end - 1 + shape.window : span.to;
    if (threadIdx.x == 0) {
        barrier_init(own_full, 1);
        stages.init(32, 4 * groups);
        barriers_are_made();
    }
    __syncthreads();

    const int first_head = key_head * shape.group;
    const int key_column = shape.key_at + key_head * shape.key_stride, value_column = shape.value_at + key_head * shape.key_stride;
    if (place.copies()) {
        if (place.warp_of_group != 0) return;
        if (place.lane == 0) {
            barrier_arrive_expecting(own_full, groups * 2 * Own::BYTES);
            for (int i = 0; i < groups; ++i) {
                Own::load(key_tiles + i * OWN_BYTES<WIDTH>, &rows, own_full, key_column, span.first + i * OWN_ROWS);
                Own::load(value_tiles + i * OWN_BYTES<WIDTH>, &rows, own_full, value_column, span.first + i * OWN_ROWS);
            }
        }
        int turn = 0;
        for (int head = first_head; head < first_head + shape.group; ++head)
            for (int row = span.first; row < end; row += QUERIES, ++turn) {
                const int stage = Stages::stage(turn);
                float* const of_rows = statistics + stage * 2 * QUERIES;
                stages.wait_empty(turn);
#pragma unroll
                for (int i = 0; i < QUERIES / 32; ++i) {
                    const int at = row + i * 32 + place.lane;
                    const uint64_t from = (uint64_t)head * shape.rows + at;
                    // A row behind the end has no probabilities.
                    of_rows[i * 32 + place.lane] = at < end ? lse[from] * LOG2_E : INFINITY;
                    of_rows[QUERIES + i * 32 + place.lane] = at < end ? delta[from] : 0.f;
                }
                if (place.lane == 0) {
                    barrier_arrive_expecting(stages.full + stage, 2 * Query::BYTES);
                    Query::load(query_tiles + stage * Query::BYTES, &rows, stages.full + stage, shape.query_column(head), row);
                    Query::load(d_tiles + stage * Query::BYTES, &d_rows, stages.full + stage, head * WIDTH, row);
                } else {
                    barrier_arrive(stages.full + stage);
                }
            }
        return;
    }
    if (place.group >= groups) return;

    unsigned char* const key_tile = key_tiles + place.group * OWN_BYTES<WIDTH>;
    unsigned char* const value_tile = value_tiles + place.group * OWN_BYTES<WIDTH>;
    const int group_first = span.first + place.group * OWN_ROWS, own = group_first + place.warp_of_group * 16;
    const float exponent = shape.exponent();
    float key_sums[1][WIDTH / 8][4] = {}, value_sums[1][WIDTH / 8][4] = {};
    float scores[1][QUERIES / 8][4], slopes[1][QUERIES / 8][4];
    uint32_t weights[QUERIES / 16][4], changes[QUERIES / 16][4];

    barrier_wait(own_full, 0, patience);
    int turn = 0;
    for (int head = first_head; head < first_head + shape.group; ++head)
        for (int row = span.first; row < end; row += QUERIES, ++turn) {
            const int stage = Stages::stage(turn);
            stages.wait_full(turn);
            if (some_seen(shape, row, QUERIES, group_first, OWN_ROWS)) {
                const unsigned char *const query_tile = query_tiles + stage * Query::BYTES, *const d_tile = d_tiles + stage * Query::BYTES;
                const float* const of_rows = statistics + stage * 2 * QUERIES + place.lane % 4 * 2;
                wgmma_fence(scores, slopes);
                start_dots<WIDTH, QUERIES>(scores, key_tile, query_tile);
                start_dots<WIDTH, QUERIES>(slopes, value_tile, d_tile);
                wgmma_wait<1>(scores);
                if (!all_seen(shape, row, QUERIES, own, 16)) hide_rows<1, QUERIES>(scores, row - own, end - row, shape);
#pragma unroll
                for (int j = 0; j < QUERIES / 8; ++j) {
                    const float2 log = load_pair(of_rows + j * 8);
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        scores[0][j][e] = exp2_approximate(fmaf(scores[0][j][e], exponent, -(e % 2 ? log.y : log.x)));
                }
                pack<QUERIES>(weights, scores);
                wgmma_fence(value_sums);
                start_weighted_rows<WIDTH, QUERIES>(value_sums, weights, d_tile);
                wgmma_wait<1>(slopes);
#pragma unroll
                for (int j = 0; j < QUERIES / 8; ++j) {
                    const float2 pull = load_pair(of_rows + QUERIES + j * 8);
#pragma unroll
                    for (int e = 0; e < 4; ++e) scores[0][j][e] *= slopes[0][j][e] - (e % 2 ? pull.y : pull.x);
                }
                pack<QUERIES>(changes, scores);
                wgmma_fence(key_sums);
                start_weighted_rows<WIDTH, QUERIES>(key_sums, changes, query_tile);
                wgmma_wait<0>(key_sums, value_sums);
            }
            stages.release(turn, place.lane);
        }

#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) key_sums[0][j][e] *= shape.scale;
    named_barrier(1 + place.group, 128);
    const int in_tile = place.warp_of_group * 16 * Tile<bf16, WIDTH>::STRIDE;
    bf16* const to = d_qkv + (uint64_t)own * d_stride;
    store_rows<bf16, WIDTH, 1>(to + key_column, d_stride, key_end - own, WIDTH, true, reinterpret_cast<bf16*>(key_tile) + in_tile, key_sums,
                               turn_back.at(own));
    store_rows<bf16, WIDTH, 1>(to + value_column, d_stride, key_end - own, WIDTH, true, reinterpret_cast<bf16*>(value_tile) + in_tile,
                               value_sums);
}

// Tile sizes: rows of the other operand that pass through a block at a time, as src/ops/attention/hopper.rs repeats
// them. A block has a processor for itself.
#define FORWARD(WIDTH, KEYS)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_hopper_forward_##WIDTH##_bf16(                          \
        const __grid_constant__ TensorMap rows_of, bf16* out, float* lse, const uint32_t* tiles, int stride, int patience,     \
        SHAPE_PARAMETERS) {                                                                                                    \
        wait_for_earlier_kernels();                                                                                            \
        forward<WIDTH, KEYS>(rows_of, out, lse, tiles, stride, patience, SHAPE);                                               \
    }
#define BACKWARD(WIDTH, STEP)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_hopper_backward_query_##WIDTH##_bf16(                   \
        const __grid_constant__ TensorMap rows_of, const __grid_constant__ TensorMap d_rows, const bf16* out,                  \
        const bf16* d_out, const float* lse, float* delta, bf16* d_qkv, const uint32_t* tiles, int out_stride, int d_stride,   \
        int patience, SHAPE_PARAMETERS, const float* cosines, const float* sines, int half, int angle_stride) {                \
        wait_for_earlier_kernels();                                                                                            \
        backward_query<WIDTH, STEP>(rows_of, d_rows, out, d_out, lse, delta, d_qkv, tiles, out_stride, d_stride, patience,     \
                                    SHAPE, Turn{cosines, sines, half, angle_stride});                                         \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_hopper_backward_key_##WIDTH##_bf16(                     \
        const __grid_constant__ TensorMap rows_of, const __grid_constant__ TensorMap d_rows, const float* lse,                 \
        const float* delta, bf16* d_qkv, const uint32_t* tiles, int d_stride, int patience, SHAPE_PARAMETERS,                  \
        const float* cosines, const float* sines, int half, int angle_stride) {                                                \
        wait_for_earlier_kernels();                                                                                            \
        backward_key<WIDTH, STEP>(rows_of, d_rows, lse, delta, d_qkv, tiles, d_stride, patience, SHAPE,                        \
                                  Turn{cosines, sines, half, angle_stride});                                                   \
    }

FORWARD(64, 128)
FORWARD(96, 128)
FORWARD(128, 128)
FORWARD(256, 64)
BACKWARD(64, 64)
BACKWARD(96, 64)
BACKWARD(128, 64)
