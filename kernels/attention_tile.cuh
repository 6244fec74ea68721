// Tiles of attention: copies of a head's rows from memory to shared memory and back, and the two products that a
// warp computes with them.
//
// A tile is [rows][WIDTH] with 16 bytes between rows. WIDTH is a multiple of 16, so rows are an odd number of
// 16-byte pieces apart, and the eight rows that one ldmatrix (or float4 load) addresses lie in eight different bank
// groups. Columns beyond a head's width and rows beyond its example are zeros, which add nothing to a product.
//
// A warp owns BANDS bands of 16 rows of the left operand and of the result. The values that it loads of the right
// operand serve all of them. Results lie as the D of mma_m16n8k16: of column block j a lane holds [g][2t, 2t+1] and
// [g+8][the same], with g = lane / 4 and t = lane % 4. bf16 uses the tensor cores; f32 uses the same layout with plain
// multiply-adds, so that both types share every line above these functions.
#pragma once
#include "common.cuh"
#include "prim.cuh"
#include "rope.cuh"

template <typename T, int WIDTH>
struct Tile {
    static constexpr int PIECE = 16 / sizeof(T);
    static constexpr int STRIDE = WIDTH + PIECE;
    static constexpr int PIECES = WIDTH / PIECE;
};

__device__ __forceinline__ void store_pair(float* to, float x, float y) {
    *reinterpret_cast<float2*>(to) = make_float2(x, y);
}
__device__ __forceinline__ void store_pair(bf16* to, float x, float y) {
    *reinterpret_cast<uint32_t*>(to) = pack_bf16(x, y);
}
__device__ __forceinline__ float2 load_pair(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ __forceinline__ float2 load_pair(const bf16* from) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(from);
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Starts the block's copy of `rows` (0 to ROWS) rows of `width` values, `stride` apart, into a tile. `aligned`:
// every row begins and ends at a multiple of 16 bytes.
template <typename T, int WIDTH, int ROWS, int THREADS>
__device__ __forceinline__ void load_rows(T* tile, const T* from, int stride, int rows, int width, bool aligned) {
    typedef Tile<T, WIDTH> Tile;
    if (aligned) {
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * Tile::PIECES; i += THREADS) {
            const int row = i / Tile::PIECES, column = i % Tile::PIECES * Tile::PIECE;
            const bool inside = row < rows && column < width;
            const T* piece = inside ? from + (uint64_t)row * stride + column : from;
            cp_async_16_or_zero(tile + row * Tile::STRIDE + column, piece, inside);
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * WIDTH; i += THREADS) {
            const int row = i / WIDTH, column = i % WIDTH;
            const bool inside = row < rows && column < width;
            tile[row * Tile::STRIDE + column] = inside ? from[(uint64_t)row * stride + column] : narrow<T>(0.f);
        }
    }
}

// The angles by which a head's gradient is turned back, beginning with a row: the pairs (i, half + i) of its columns.
// Rows lie `stride` apart. `cosines` null: nothing is turned.
struct Turn {
    const float *cosines, *sines;
    int half, stride;
    __device__ __forceinline__ Turn at(int row) const {
        const uint64_t first = cosines ? (uint64_t)row * stride : 0;
        return {cosines + first, sines + first, half, stride};
    }
};

// Turns the first `rows` of a warp's own rows in its tile, which holds them as they would lie in memory. So the bits
// are those of a pass over memory of its own.
template <typename T, int WIDTH, int BANDS>
__device__ __forceinline__ void turn_rows(T* tile, int rows, const Turn& turn) {
    typedef Tile<T, WIDTH> Tile;
    const int lane = threadIdx.x & 31, own = rows < 16 * BANDS ? rows : 16 * BANDS;
    if (turn.half % 8 == 0) {
        const int parts = turn.half / 8;
#pragma unroll 1
        for (int item = lane; item < own * parts; item += 32) {
            const int row = item / parts, i = (item - row * parts) * 8;
            T* at = tile + row * Tile::STRIDE + i;
            const uint64_t angle = (uint64_t)row * turn.stride + i;
            Eight<T> a, b;
            Eight<float> c, s;
            a.load(at), b.load(at + turn.half), c.load(turn.cosines + angle), s.load(turn.sines + angle);
#pragma unroll
            for (int j = 0; j < 8; ++j) turn_pair(a.v[j], b.v[j], c.v[j], s.v[j] * -1.f);
            a.store(at), b.store(at + turn.half);
        }
    } else {
#pragma unroll 1
        for (int item = lane; item < own * turn.half; item += 32) {
            const int row = item / turn.half, i = item - row * turn.half;
            T* at = tile + row * Tile::STRIDE + i;
            const uint64_t angle = (uint64_t)row * turn.stride + i;
            float a = widen(at[0]), b = widen(at[turn.half]);
            turn_pair(a, b, turn.cosines[angle], turn.sines[angle] * -1.f);
            at[0] = narrow<T>(a), at[turn.half] = narrow<T>(b);
        }
    }
    __syncwarp();
}

// Writes a warp's result to memory through its own rows of `tile`: 16 bytes per lane instead of 4 or 8. With angles, it
// is turned back on the way.
template <typename T, int WIDTH, int BANDS>
__device__ __forceinline__ void store_rows(T* to, int stride, int rows, int width, bool aligned, T* tile,
                                           const float (&values)[BANDS][WIDTH / 8][4], const Turn& turn = {}) {
    typedef Tile<T, WIDTH> Tile;
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    __syncwarp();
#pragma unroll
    for (int band = 0; band < BANDS; ++band)
#pragma unroll
        for (int j = 0; j < WIDTH / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                store_pair(tile + (band * 16 + half * 8 + g) * Tile::STRIDE + j * 8 + t * 2, values[band][j][2 * half],
                           values[band][j][2 * half + 1]);
    __syncwarp();
    if (turn.cosines) turn_rows<T, WIDTH, BANDS>(tile, rows, turn);
    if (aligned) {
#pragma unroll 2
        for (int i = lane; i < BANDS * 16 * Tile::PIECES; i += 32) {
            const int row = i / Tile::PIECES, column = i % Tile::PIECES * Tile::PIECE;
            if (row < rows && column < width)
                *reinterpret_cast<uint4*>(to + (uint64_t)row * stride + column) =
                    *reinterpret_cast<const uint4*>(tile + row * Tile::STRIDE + column);
        }
    } else {
#pragma unroll 1
        for (int i = lane; i < BANDS * 16 * WIDTH; i += 32) {
            const int row = i / WIDTH, column = i % WIDTH;
            if (row < rows && column < width) to[(uint64_t)row * stride + column] = tile[row * Tile::STRIDE + column];
        }
    }
}

// c[i][j] = sum over the width of a[i] * b[j], for the warp's rows of `a` and COLUMNS rows of `b`.
template <int WIDTH, int BANDS, int COLUMNS>
__device__ __forceinline__ void dot_rows(float (&c)[BANDS][COLUMNS / 8][4], const bf16* a, const bf16* b) {
    constexpr int STRIDE = Tile<bf16, WIDTH>::STRIDE;
    const int lane = threadIdx.x & 31;
    const bf16* a_row = a + (lane & 15) * STRIDE + (lane >> 4) * 8;
    const bf16* b_row = b + ((lane & 7) + (lane >> 4) * 8) * STRIDE + (lane >> 3 & 1) * 8;
#pragma unroll
    for (int band = 0; band < BANDS; ++band)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) c[band][j][e] = 0.f;
#pragma unroll
    for (int k = 0; k < WIDTH; k += 16) {
        uint32_t left[BANDS][4];
#pragma unroll
        for (int band = 0; band < BANDS; ++band) ldmatrix_x4(left[band], a_row + band * 16 * STRIDE + k);
#pragma unroll
        for (int j = 0; j < COLUMNS / 16; ++j) {
            uint32_t right[4];
            ldmatrix_x4(right, b_row + j * 16 * STRIDE + k);
            const uint32_t even[2] = {right[0], right[1]}, odd[2] = {right[2], right[3]};
#pragma unroll
            for (int band = 0; band < BANDS; ++band) {
                mma_m16n8k16(c[band][2 * j], left[band], even);
                mma_m16n8k16(c[band][2 * j + 1], left[band], odd);
            }
        }
    }
}

template <int WIDTH, int BANDS, int COLUMNS>
__device__ __forceinline__ void dot_rows(float (&c)[BANDS][COLUMNS / 8][4], const float* a, const float* b) {
    constexpr int STRIDE = Tile<float, WIDTH>::STRIDE;
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int band = 0; band < BANDS; ++band)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) c[band][j][e] = 0.f;
#pragma unroll 1
    for (int k = 0; k < WIDTH; k += 4)
#pragma unroll
        for (int band = 0; band < BANDS; ++band) {
            const float4 upper = *reinterpret_cast<const float4*>(a + (band * 16 + g) * STRIDE + k);
            const float4 lower = *reinterpret_cast<const float4*>(a + (band * 16 + g + 8) * STRIDE + k);
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float4 x = *reinterpret_cast<const float4*>(b + (j * 8 + t * 2 + e) * STRIDE + k);
                    c[band][j][e] += upper.x * x.x + upper.y * x.y + upper.z * x.z + upper.w * x.w;
                    c[band][j][e + 2] += lower.x * x.x + lower.y * x.y + lower.z * x.z + lower.w * x.w;
                }
        }
}

// c[i] += sum over j of weights[i][j] * b[j], for the warp's rows of weights, which it holds as a result, and ROWS
// rows of `b`. In bf16 a rounded result already has the layout of the next product's left operand. f32 does not,
// and goes through `scratch`, [16 * BANDS][ROWS + 4], which the warp owns; bf16 does not touch it.
template <int WIDTH, int BANDS, int ROWS>
__device__ __forceinline__ void add_weighted_rows(float (&c)[BANDS][WIDTH / 8][4], const float (&weights)[BANDS][ROWS / 8][4],
                                                  const bf16* b, float*) {
    constexpr int STRIDE = Tile<bf16, WIDTH>::STRIDE;
    const int lane = threadIdx.x & 31;
    const bf16* b_row = b + (lane & 15) * STRIDE + (lane >> 4) * 8;
#pragma unroll
    for (int k = 0; k < ROWS / 16; ++k) {
        uint32_t left[BANDS][4];
#pragma unroll
        for (int band = 0; band < BANDS; ++band)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float(&pairs)[4] = weights[band][2 * k + e / 2];
                left[band][e] = pack_bf16(pairs[e % 2 * 2], pairs[e % 2 * 2 + 1]);
            }
#pragma unroll
        for (int j = 0; j < WIDTH / 16; ++j) {
            uint32_t right[4];
            ldmatrix_x4_trans(right, b_row + k * 16 * STRIDE + j * 16);
            const uint32_t even[2] = {right[0], right[1]}, odd[2] = {right[2], right[3]};
#pragma unroll
            for (int band = 0; band < BANDS; ++band) {
                mma_m16n8k16(c[band][2 * j], left[band], even);
                mma_m16n8k16(c[band][2 * j + 1], left[band], odd);
            }
        }
    }
}

template <int WIDTH, int BANDS, int ROWS>
__device__ __forceinline__ void add_weighted_rows(float (&c)[BANDS][WIDTH / 8][4], const float (&weights)[BANDS][ROWS / 8][4],
                                                  const float* b, float* scratch) {
    constexpr int STRIDE = Tile<float, WIDTH>::STRIDE;
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    __syncwarp();
#pragma unroll
    for (int band = 0; band < BANDS; ++band)
#pragma unroll
        for (int j = 0; j < ROWS / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                store_pair(scratch + (band * 16 + half * 8 + g) * (ROWS + 4) + j * 8 + t * 2, weights[band][j][2 * half],
                           weights[band][j][2 * half + 1]);
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < ROWS; ++k)
#pragma unroll
        for (int band = 0; band < BANDS; ++band) {
            const float upper = scratch[(band * 16 + g) * (ROWS + 4) + k];
            const float lower = scratch[(band * 16 + g + 8) * (ROWS + 4) + k];
#pragma unroll
            for (int j = 0; j < WIDTH / 8; ++j) {
                const float2 x = load_pair(b + k * STRIDE + j * 8 + t * 2);
                c[band][j][0] += upper * x.x;
                c[band][j][1] += upper * x.y;
                c[band][j][2] += lower * x.x;
                c[band][j][3] += lower * x.y;
            }
        }
}
