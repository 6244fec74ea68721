// Attention of new rows over keys and values in pages, as serving has it; the twin of src/ops/attention/cached.rs.
//
// A page holds 32 tokens of one sequence: [page][key head][token][width]. The page numbers of all sequences lie one
// behind the other in `pages`. A row that generates is read by `decode`: a block takes one piece of the row's keys and
// the query heads of one key head, so that a key and a value are read once for all of them. Keys of a long row are in
// several pieces; `combine` adds their results in the order of positions. The cut of a row depends on its own position
// alone, and no sum spans two sequences. So a row's bits do not depend on the other rows of the step. Many rows of one
// sequence are `gather`ed into the layout of training's attention instead (attention.cu).
#include "attention_shape.cuh"
#include "eight_bits.cuh"

constexpr int PAGE = 32;
constexpr int WARPS = 4;
constexpr int PIECE_KEYS = 256;  // most keys of a piece

// Eight values from `column` on, zeros beyond the head's width.
template <typename T>
__device__ __forceinline__ void load_eight(float (&to)[8], const T* row, int column, int width, bool aligned) {
    if (aligned && column + 8 <= width) {
        Eight<T> values;
        values.load(row + column);
#pragma unroll
        for (int e = 0; e < 8; ++e) to[e] = values.v[e];
        return;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e] = column + e < width ? widen(row[column + e]) : 0.f;
}

// Offset of the keys or values of one token and head.
__device__ __forceinline__ uint64_t token_at(const uint32_t* pages, int token, int key_heads, int key_head, int width) {
    return (((uint64_t)pages[token / PAGE] * key_heads + key_head) * PAGE + token % PAGE) * width;
}

// A block turns one row's queries and keys by its angles (cos and sin [rows * runs, half], none: `half` is 0) as
// rope.cu does, and keeps its keys and values, rounded once to the cache's type. `slots` [rows]: page * 32 +
// token. Eight values a thread where heads and halves are multiples of eight.
template <typename T, typename C>
__device__ __forceinline__ void write(T* qkv, C* keys, C* values, const uint32_t* slots, const float* cosines,
                                      const float* sines, int runs, int half, const Shape& shape) {
    const int key_heads = shape.heads / shape.group, width = shape.width;
    const uint32_t slot = slots[blockIdx.x];
    qkv += (uint64_t)blockIdx.x * shape.columns;
    cosines += (uint64_t)blockIdx.x * runs * half, sines += (uint64_t)blockIdx.x * runs * half;
    const auto kept = [&](int head) { return (((uint64_t)(slot / PAGE) * key_heads + head) * PAGE + slot % PAGE) * width; };
    if (half % 8 == 0 && shape.aligned) {
        const int pairs = half / 8, rest = (width - 2 * half) / 8, all = width / 8;
        for (int item = threadIdx.x; item < (shape.heads + key_heads) * pairs; item += blockDim.x) {
            const int head = item / pairs, i = (item - head * pairs) * 8, key = head - shape.heads;
            T* at = qkv + (key < 0 ? shape.query_column(head) : shape.key_at + key * shape.key_stride) + i;
            Eight<T> a, b;
            Eight<float> c, s;
            a.load(at), b.load(at + half), c.load(cosines + i), s.load(sines + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float left = a.v[j], right = b.v[j];
                a.v[j] = left * c.v[j] - right * s.v[j];
                b.v[j] = right * c.v[j] + left * s.v[j];
            }
            a.store(at), b.store(at + half);
            if (key >= 0) {
                Eight<C> first, second;
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    first.v[j] = widen(narrow<T>(a.v[j]));
                    second.v[j] = widen(narrow<T>(b.v[j]));
                }
                first.store(keys + kept(key) + i), second.store(keys + kept(key) + half + i);
            }
        }
        for (int item = threadIdx.x; item < key_heads * (rest + all); item += blockDim.x) {
            const int head = item / (rest + all), i = item - head * (rest + all), from = head * shape.key_stride;
            Eight<T> a;
            Eight<C> b;
            a.load(qkv + from + (i < rest ? shape.key_at + 2 * half + i * 8 : shape.value_at + (i - rest) * 8));
#pragma unroll
            for (int j = 0; j < 8; ++j) b.v[j] = a.v[j];
            b.store(i < rest ? keys + kept(head) + 2 * half + i * 8 : values + kept(head) + (i - rest) * 8);
        }
        return;
    }
    for (int item = threadIdx.x; item < (shape.heads + key_heads) * half; item += blockDim.x) {
        const int head = item / half, i = item - head * half, key = head - shape.heads;
        T* at = qkv + (key < 0 ? shape.query_column(head) : shape.key_at + key * shape.key_stride) + i;
        const float left = widen(at[0]), right = widen(at[half]);
        at[0] = narrow<T>(left * cosines[i] - right * sines[i]);
        at[half] = narrow<T>(right * cosines[i] + left * sines[i]);
        if (key >= 0) {
            keys[kept(key) + i] = narrow<C>(widen(at[0]));
            keys[kept(key) + half + i] = narrow<C>(widen(at[half]));
        }
    }
    for (int item = threadIdx.x; item < key_heads * width; item += blockDim.x) {
        const int head = item / width, column = item - head * width;
        const T* from = qkv + head * shape.key_stride + column;
        if (column >= 2 * half) keys[kept(head) + column] = narrow<C>(widen(from[shape.key_at]));
        values[kept(head) + column] = narrow<C>(widen(from[shape.value_at]));
    }
}

// A block makes one row of `wide`, which has the columns of qkv: the token's keys and values from the cache and,
// of the new rows that begin at position `start`, the queries. `qkv` points to the first new row, `pages` to the
// sequence's.
template <typename T, typename C>
__device__ __forceinline__ void gather(const T* qkv, const C* keys, const C* values, T* wide, const uint32_t* pages,
                                       int start, const Shape& shape) {
    const int position = blockIdx.x, key_heads = shape.heads / shape.group;
    wide += (uint64_t)position * shape.columns;
    for (int i = threadIdx.x; i < key_heads * shape.width; i += blockDim.x) {
        const int head = i / shape.width, column = i - head * shape.width;
        const uint64_t from = token_at(pages, position, key_heads, head, shape.width) + column;
        T* to = wide + head * shape.key_stride + column;
        to[shape.key_at] = narrow<T>(widen(keys[from]));
        to[shape.value_at] = narrow<T>(widen(values[from]));
    }
    if (position < start) return;
    qkv += (uint64_t)(position - start) * shape.columns;
    for (int i = threadIdx.x; i < shape.heads * shape.width; i += blockDim.x) {
        const int column = shape.query_column(i / shape.width) + i % shape.width;
        wide[column] = qkv[column];
    }
}

// One piece of a row's keys.
struct Piece {
    int row, position, pages_at, from, to;
    uint32_t partial;  // the piece's number among those that are combined; NONE: it is its row's only one
    static constexpr uint32_t NONE = 0xffffffffu;
    __device__ __forceinline__ explicit Piece(const uint32_t* t)
        : row(t[0]), position(t[1]), pages_at(t[2]), from(t[3]), to(t[4]), partial(t[5]) {}
};

// blockIdx.x: a key head and at most GROUP of its query heads; blockIdx.y: a piece. Eight columns a lane, so that
// LANES lanes read a key or value and a warp reads 32 / LANES of them at once, AHEAD times before it computes.
template <typename T, typename C, int WIDTH, int GROUP>
__device__ __forceinline__ void decode(const T* qkv, const C* keys, const C* values, T* out, float* partials,
                                       const uint32_t* pieces, const uint32_t* pages, const Shape shape) {
    if (pieces[6 * blockIdx.y + 4] == 0) return;  // padding of the list; the whole block leaves
    constexpr int LANES = WIDTH == 32 ? 4 : WIDTH == 64 ? 8 : WIDTH <= 128 ? 16 : 32;
    constexpr int SIDE = 32 / LANES, AHEAD = 4, STEP = SIDE * AHEAD;
    SHARED_ARRAY(float, scores, GROUP * PIECE_KEYS);
    SHARED_ARRAY(float, sums, WARPS * GROUP * WIDTH);
    SHARED_ARRAY(float, statistics, 2 * GROUP);  // largest exponent and sum of each head
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, side = lane / LANES, column = lane % LANES * 8;
    const int parts = (shape.group + GROUP - 1) / GROUP, key_heads = shape.heads / shape.group;
    const int key_head = blockIdx.x / parts, member = blockIdx.x % parts * GROUP;
    const int head = key_head * shape.group + member, count = min(GROUP, shape.group - member);
    const Piece piece(pieces + 6 * (uint64_t)blockIdx.y);
    const bool inside = column < shape.width;
    pages += piece.pages_at;

    float q[GROUP][8];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        const T* query = qkv + (uint64_t)piece.row * shape.columns + shape.query_column(head + (g < count ? g : 0));
        load_eight(q[g], query, column, shape.width, shape.aligned);
    }
    const auto load = [&](float(&to)[AHEAD][8], const C* cache, int first) {
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int key = first + a * SIDE + side;
            if (inside && key < piece.to) {
                load_eight(to[a], cache + token_at(pages, key, key_heads, key_head, shape.width), column, shape.width,
                           shape.aligned);
            } else {
#pragma unroll
                for (int e = 0; e < 8; ++e) to[a][e] = 0.f;
            }
        }
    };

    for (int first = piece.from + warp * STEP; first < piece.to; first += WARPS * STEP) {
        float k[AHEAD][8];
        load(k, keys, first);
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int key = first + a * SIDE + side;
            const bool seen = shape.sees(piece.position - key);
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
                float score = 0.f;
#pragma unroll
                for (int e = 0; e < 8; ++e) score += q[g][e] * k[a][e];
#pragma unroll
                for (int offset = LANES / 2; offset > 0; offset >>= 1) score += __shfl_xor_sync(0xffffffffu, score, offset);
                if (shape.cap > 0.f) score = shape.curve(score);
                if (column == 0 && key < piece.to) scores[g * PIECE_KEYS + key - piece.from] = seen ? score : -INFINITY;
            }
        }
    }
    __syncthreads();

    const float exponent = shape.exponent();
    const int length = piece.to - piece.from;
    for (int g = warp; g < count; g += WARPS) {
        float* row = scores + g * PIECE_KEYS;
        float top = -INFINITY, sum = 0.f;
        for (int i = lane; i < length; i += 32) top = fmaxf(top, row[i]);
        top = warp_max(top);
        // If the row sees no key of the piece, there is no largest score to subtract.
        const float base = top == -INFINITY ? 0.f : top * exponent;
        for (int i = lane; i < length; i += 32) {
            const float p = exp2_approximate(fmaf(row[i], exponent, -base));
            row[i] = p;
            sum += p;
        }
        sum = warp_sum(sum);
        if (lane == 0) statistics[2 * g] = top == -INFINITY ? -INFINITY : base, statistics[2 * g + 1] = sum;
    }
    __syncthreads();

    float total[GROUP][8] = {};
    for (int first = piece.from + warp * STEP; first < piece.to; first += WARPS * STEP) {
        float v[AHEAD][8];
        load(v, values, first);
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int key = first + a * SIDE + side;
            if (key >= piece.to) break;
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
                if (g >= count) break;
                const float p = scores[g * PIECE_KEYS + key - piece.from];
#pragma unroll
                for (int e = 0; e < 8; ++e) total[g][e] = fmaf(p, v[a][e], total[g][e]);
            }
        }
    }
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
#pragma unroll
            for (int offset = LANES; offset < 32; offset <<= 1)
                total[g][e] += __shfl_xor_sync(0xffffffffu, total[g][e], offset);
            if (side == 0 && column < WIDTH) sums[(warp * GROUP + g) * WIDTH + column + e] = total[g][e];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * shape.width; i += 32 * WARPS) {
        const int g = i / shape.width, at = i - g * shape.width;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += sums[(w * GROUP + g) * WIDTH + at];
        if (piece.partial == Piece::NONE) {
            out[((uint64_t)piece.row * shape.heads + head + g) * shape.width + at] = narrow<T>(sum / statistics[2 * g + 1]);
        } else {
            float* to = partials + ((uint64_t)piece.partial * shape.heads + head + g) * (shape.width + 2);
            to[2 + at] = sum;
            if (at == 0) to[0] = statistics[2 * g], to[1] = statistics[2 * g + 1];
        }
    }
}

// The pieces of a row in the order of their keys: blockIdx.x is the head, `rows` holds (row, its first piece, how
// many).
template <typename T>
__device__ __forceinline__ void combine(const float* partials, T* out, const uint32_t* rows, int heads, int width) {
    const uint32_t row = rows[3 * blockIdx.y], count = rows[3 * blockIdx.y + 2];
    if (count == 0) return;  // it fills the list up
    const uint64_t stride = (uint64_t)heads * (width + 2);
    partials += ((uint64_t)rows[3 * blockIdx.y + 1] * heads + blockIdx.x) * (width + 2);
    float top = -INFINITY;
    for (uint32_t i = 0; i < count; ++i) top = fmaxf(top, partials[i * stride]);
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        float sum = 0.f, total = 0.f;
        for (uint32_t i = 0; i < count; ++i) {
            const float* part = partials + i * stride;
            const float share = exp2_approximate(part[0] - top);
            sum = fmaf(share, part[2 + at], sum);
            total = fmaf(share, part[1], total);
        }
        out[((uint64_t)row * heads + blockIdx.x) * width + at] = narrow<T>(sum / total);
    }
}

// Names: activations' type last, the cache's type before it.
#define DECODE(T, type, C, cache, BLOCKS, WIDTH, GROUP)                                                             \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                \
        cached_decode_##WIDTH##_##GROUP##_##cache##_##type(const T* qkv, const C* keys, const C* values, T* out,    \
                                                           float* partials, const uint32_t* pieces,                 \
                                                           const uint32_t* pages, SHAPE_PARAMETERS) {               \
        wait_for_earlier_kernels();                                                                                 \
        decode<T, C, WIDTH, GROUP>(qkv, keys, values, out, partials, pieces, pages, SHAPE);                         \
    }
#define FOR(T, type, C, cache, BLOCKS)                                                                              \
    extern "C" __global__ void cached_write_##cache##_##type(T* qkv, C* keys, C* values, const uint32_t* slots,     \
                                                             const float* cosines, const float* sines, int runs,    \
                                                             int half, SHAPE_PARAMETERS) {                          \
        wait_for_earlier_kernels();                                                                                 \
        write<T, C>(qkv, keys, values, slots, cosines, sines, runs, half, SHAPE);                                   \
    }                                                                                                               \
    extern "C" __global__ void cached_gather_##cache##_##type(const T* qkv, const C* keys, const C* values, T* wide, \
                                                              const uint32_t* pages, int start, SHAPE_PARAMETERS) { \
        wait_for_earlier_kernels();                                                                                 \
        gather<T, C>(qkv, keys, values, wide, pages, start, SHAPE);                                                 \
    }                                                                                                               \
    DECODE(T, type, C, cache, BLOCKS, 32, 1)                                                                        \
    DECODE(T, type, C, cache, BLOCKS, 64, 1)                                                                        \
    DECODE(T, type, C, cache, BLOCKS, 96, 1)                                                                        \
    DECODE(T, type, C, cache, BLOCKS, 128, 1)                                                                       \
    DECODE(T, type, C, cache, BLOCKS, 256, 1)                                                                       \
    DECODE(T, type, C, cache, BLOCKS, 32, 4)                                                                        \
    DECODE(T, type, C, cache, BLOCKS, 64, 4)                                                                        \
    DECODE(T, type, C, cache, BLOCKS, 96, 4)                                                                        \
    DECODE(T, type, C, cache, BLOCKS, 128, 4)                                                                       \
    DECODE(T, type, C, cache, BLOCKS, 256, 4)

FOR(float, f32, float, f32, 5)
FOR(float, f32, bf16, bf16, 5)
FOR(bf16, bf16, bf16, bf16, 5)
// Widening 8-bit values takes more registers, so that fewer blocks may run side by side.
FOR(float, f32, fp8, fp8, 4)
FOR(bf16, bf16, fp8, fp8, 4)

extern "C" __global__ void cached_combine_f32(const float* partials, float* out, const uint32_t* rows, int heads, int width) {
    wait_for_earlier_kernels();
    combine<float>(partials, out, rows, heads, width);
}
extern "C" __global__ void cached_combine_bf16(const float* partials, bf16* out, const uint32_t* rows, int heads, int width) {
    wait_for_earlier_kernels();
    combine<bf16>(partials, out, rows, heads, width);
}
