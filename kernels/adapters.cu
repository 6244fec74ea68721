// Adds several adapters to the rows of a step: y[row] += sum of strength * scale * (x[row] A^T) B^T, each row
// with adapters and strengths of its own; the twin of src/ops/adapters.rs.
//
// `shrink` makes x A^T of all items and of up to three layers that read the same x; `norm` and `activated` make x, too.
// A product of few rows adds the rest where it writes y (matmul.cu). After another product, `expand` adds the sum of a
// row's items, in their order, and rounds once. A row's result does not depend on other rows.
#include "activation.cuh"
#include "adapters.cuh"

// Layers side by side: their numbers, where their columns begin in y, and how many they have.
#define SITES_PARAMETERS int site_0, int site_1, int site_2
#define PARTS_PARAMETERS SITES_PARAMETERS, int at_0, int at_1, int at_2, int n_0, int n_1, int n_2
#define PICK(name) (blockIdx.z == 0 ? name##_0 : blockIdx.z == 1 ? name##_1 : name##_2)

// Threads of a block: all of them share the sums over k, since few blocks are busy if a step has few rows.
constexpr int THREADS = 256;

// The layers' input x [rows, k] as it lies in memory.
template <typename T>
struct AsItIs {
    const T* x;
    static constexpr bool ANY_WIDTH = true, TAKES_TIME = false;
    __device__ __forceinline__ void begin(int row, int k) { x += (uint64_t)row * k; }
    __device__ __forceinline__ Eight<T> eight(int i) const {
        Eight<T> values;
        values.load(x + i);
        return values;
    }
    __device__ __forceinline__ float one(int i) const { return widen(x[i]); }
};

// The layers' input as the norm of x, with the bits of rms_norm.cu. k is a multiple of eight.
struct Normed {
    const bf16* x;
    const float* w;
    float eps, scale;
    static constexpr bool ANY_WIDTH = false, TAKES_TIME = true;  // it reads its row twice
    __device__ __forceinline__ void begin(int row, int k) {
        x += (uint64_t)row * k;
        float sum = 0.f;
        for (int i = threadIdx.x * 8; i < k; i += blockDim.x * 8) {
            Eight<bf16> a;
            a.load(x + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += a.v[j] * a.v[j];
        }
        scale = 1.f / sqrtf(block_sum(sum) / (float)k + eps);
    }
    __device__ __forceinline__ Eight<bf16> eight(int i) const {
        Eight<bf16> a;
        Eight<float> b;
        a.load(x + i), b.load(w + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) a.v[j] = widen(narrow<bf16>(a.v[j] * scale * b.v[j]));
        return a;
    }
    __device__ __forceinline__ float one(int) const { return 0.f; }
};

// The layer's input as the activation of x, with the bits of activation.cu. k is a multiple of eight.
template <typename Curve>
struct Activated {
    const bf16* x;
    int k, gated;
    static constexpr bool ANY_WIDTH = false, TAKES_TIME = false;
    __device__ __forceinline__ void begin(int row, int) { x += (uint64_t)row * k * (gated ? 2 : 1); }
    __device__ __forceinline__ Eight<bf16> eight(int i) const {
        Eight<bf16> a, up = {};
        a.load(x + i);
        if (gated) up.load(x + k + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) a.v[j] = widen(narrow<bf16>(Curve::at(a.v[j]).value * (gated ? up.v[j] : 1.f)));
        return a;
    }
    __device__ __forceinline__ float one(int) const { return 0.f; }
};

// Eight neighbouring values as they are stored.
template <typename T> struct Stored;
template <> struct Stored<float> {
    float4 words[2];
    __device__ __forceinline__ void load(const float* from) {
        words[0] = reinterpret_cast<const float4*>(from)[0], words[1] = reinterpret_cast<const float4*>(from)[1];
    }
    __device__ __forceinline__ Eight<float> wide() const {
        return {{words[0].x, words[0].y, words[0].z, words[0].w, words[1].x, words[1].y, words[1].z, words[1].w}};
    }
};
template <> struct Stored<bf16> {
    uint4 words;
    __device__ __forceinline__ void load(const bf16* from) { words = *reinterpret_cast<const uint4*>(from); }
    __device__ __forceinline__ Eight<bf16> wide() const {
        const uint32_t all[4] = {words.x, words.y, words.z, words.w};
        Eight<bf16> values;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values.v[2 * i] = __uint_as_float(all[i] << 16);
            values.v[2 * i + 1] = __uint_as_float(all[i] & 0xffff0000u);
        }
        return values;
    }
};

// A block makes RANKS values of each of `members` items, at most GROUP, that lie together in the list and have one
// table: low [part, item, rank_max]. A thread loads the values of A for STEPS of its sums at once, since nothing else
// hides the latency of memory. The order of a sum depends on k alone.
template <typename T, int RANKS, int STEPS, int GROUP, typename Source>
__device__ __forceinline__ void shrink(const Source& input, const uint32_t* items, int item, int members, const Pair& pair,
                                       float* low, int k, int rank_max) {
    SHARED_ARRAY(float, parts, THREADS / 32 * RANKS * GROUP);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first = blockIdx.x * RANKS;
    const T* a[RANKS];
#pragma unroll
    for (int j = 0; j < RANKS; ++j) a[j] = reinterpret_cast<const T*>(pair.a) + (uint64_t)min(first + j, pair.rank - 1) * k;
    if (Source::TAKES_TIME) {
        // A comes from memory while the source begins.
        constexpr int LINE = 128 / sizeof(T);
#pragma unroll
        for (int j = 0; j < RANKS; ++j)
            for (int i = threadIdx.x * LINE; i < k; i += THREADS * LINE) read_ahead(a[j] + i);
    }
    Source x[GROUP];
#pragma unroll
    for (int m = 0; m < GROUP; ++m) {
        x[m] = input;
        if (m < members) x[m].begin(Item(items + 4 * (uint64_t)(item + m)).row, k);
    }
    float sums[GROUP][RANKS] = {};
    if (!Source::ANY_WIDTH || k % 8 == 0) {
        constexpr int STRIDE = THREADS * 8;
        for (int from = threadIdx.x * 8; from < k; from += STEPS * STRIDE) {
            Stored<T> right[STEPS][RANKS] = {};
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
#pragma unroll
                for (int j = 0; j < RANKS; ++j)
                    if (from + step * STRIDE < k) right[step][j].load(a[j] + from + step * STRIDE);
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                if (from + step * STRIDE >= k) break;
#pragma unroll
                for (int m = 0; m < GROUP; ++m) {
                    if (m >= members) break;
                    const Eight<T> left = x[m].eight(from + step * STRIDE);
#pragma unroll
                    for (int j = 0; j < RANKS; ++j) {
                        const Eight<T> own = right[step][j].wide();
#pragma unroll
                        for (int e = 0; e < 8; ++e) sums[m][j] = fmaf(left.v[e], own.v[e], sums[m][j]);
                    }
                }
            }
        }
    } else {
        for (int i = threadIdx.x; i < k; i += THREADS) {
#pragma unroll
            for (int m = 0; m < GROUP; ++m) {
                if (m >= members) break;
#pragma unroll
                for (int j = 0; j < RANKS; ++j) sums[m][j] = fmaf(x[m].one(i), widen(a[j][i]), sums[m][j]);
            }
        }
    }
    __syncthreads();  // `parts` may still be read for other items
#pragma unroll
    for (int m = 0; m < GROUP; ++m) {
#pragma unroll
        for (int j = 0; j < RANKS; ++j) {
            const float sum = warp_sum(sums[m][j]);
            if (lane == 0) parts[(warp * GROUP + m) * RANKS + j] = sum;
        }
    }
    __syncthreads();
    const int m = threadIdx.x / RANKS, rank = first + threadIdx.x % RANKS;
    if (m >= members || rank >= pair.rank) return;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) sum += parts[i * GROUP * RANKS + threadIdx.x];
    low[(uint64_t)(item + m) * rank_max + rank] = sum;
}

// blockIdx.y counts groups of GROUP items in the order of the list. Neighbouring items of one adapter share the values
// that are read of A.
template <typename T, int RANKS, int STEPS, int GROUP>
__device__ __forceinline__ void shrink_all(const T* x, const uint32_t* items, float* low, int k, int rank_max, int count,
                                           SITES_PARAMETERS) {
    low += (uint64_t)blockIdx.z * count * rank_max;
    const int end = min(count, ((int)blockIdx.y + 1) * GROUP);
    for (int item = blockIdx.y * GROUP; item < end;) {
        const Item own(items + 4 * (uint64_t)item);
        int members = 1;
        while (item + members < end && Item(items + 4 * (uint64_t)(item + members)).table == own.table) ++members;
        if (own.table == nullptr) return;  // it and those behind it fill the list up
        const Pair pair(own.table, PICK(site));
        if ((int)blockIdx.x * RANKS < pair.rank)
            shrink<T, RANKS, STEPS, GROUP>(AsItIs<T>{x}, items, item, members, pair, low, k, rank_max);
        item += members;
    }
}

// The same for an input that is computed here, with an item for each blockIdx.y. Blocks beyond the items write the
// input to out [rows, k], a row each.
template <int RANKS, int STEPS, typename Source>
__device__ __forceinline__ void make_and_shrink(Source x, bf16* out, int rows, const uint32_t* items, float* low, int k,
                                                int rank_max, int count, SITES_PARAMETERS) {
    if ((int)blockIdx.y < count) {
        const Item item(items + 4 * (uint64_t)blockIdx.y);
        if (item.table == nullptr) return;  // it is padding of the list
        const Pair pair(item.table, PICK(site));
        if ((int)blockIdx.x * RANKS >= pair.rank) return;
        low += (uint64_t)blockIdx.z * count * rank_max;
        shrink<bf16, RANKS, STEPS, 1>(x, items, blockIdx.y, 1, pair, low, k, rank_max);
        return;
    }
    const int row = ((blockIdx.y - count) * gridDim.z + blockIdx.z) * gridDim.x + blockIdx.x;
    if (row >= rows) return;
    x.begin(row, k);
    for (int i = threadIdx.x * 8; i < k; i += THREADS * 8) x.eight(i).store(out + (uint64_t)row * k + i);
}

// blockIdx.y is an entry of `rows`; a thread takes a column.
template <typename T>
__device__ __forceinline__ void expand(const float* low, const uint32_t* items, const uint32_t* rows, T* y, int stride, int count,
                                       int rank_max, float factor, PARTS_PARAMETERS) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= PICK(n)) return;
    const uint32_t* own = rows + 3 * (uint64_t)blockIdx.y;
    if (own[2] == 0) return;  // the row has no adapter
    float total = 0.f;
    for (uint32_t i = own[1]; i < own[1] + own[2]; ++i) {
        const Item item(items + 4 * (uint64_t)i);
        const Pair pair(item.table, PICK(site));
        const T* b = reinterpret_cast<const T*>(pair.b) + (uint64_t)column * pair.rank;
        const float sum = through_b(low + ((uint64_t)blockIdx.z * count + i) * rank_max, b, pair.rank);
        total = fmaf(item.strength * pair.scale * factor, sum, total);
    }
    T* to = y + (uint64_t)own[0] * stride + PICK(at) + column;
    *to = narrow<T>(widen(*to) + total);
}

#define SITES site_0, site_1, site_2
#define PARTS SITES, at_0, at_1, at_2, n_0, n_1, n_2
// Ranks of a block: more of them read x less often, fewer make more blocks. src/ops/adapters.rs repeats them. A norm's
// input is narrower than an activation, which needs more steps.
constexpr int READ_RANKS = 2, NORM_RANKS = 4, ACTIVATED_RANKS = 2;
// Items of a block.
constexpr int ITEMS = 4;

#define FOR(T, type)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS) adapters_shrink_##type(                                         \
        const T* x, const uint32_t* items, float* low, int k, int rank_max, int count, SITES_PARAMETERS) {                \
        wait_for_earlier_kernels();                                                                                       \
        shrink_all<T, READ_RANKS, 4, ITEMS>(x, items, low, k, rank_max, count, SITES);                                    \
    }                                                                                                                     \
    extern "C" __global__ void adapters_expand_##type(const float* low, const uint32_t* items, const uint32_t* rows,      \
                                                      T* y, int stride, int count, int rank_max, float factor,            \
                                                      PARTS_PARAMETERS) {                                                 \
        wait_for_earlier_kernels();                                                                                       \
        expand<T>(low, items, rows, y, stride, count, rank_max, factor, PARTS);                                           \
    }
FOR(float, f32)
FOR(bf16, bf16)

#define OUT_PARAMETERS bf16 *out, const uint32_t *items, float *low, int rows, int k, int rank_max, int count, SITES_PARAMETERS
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    adapters_norm_bf16(const bf16* x, const float* w, float eps, OUT_PARAMETERS) {
    wait_for_earlier_kernels();
    make_and_shrink<NORM_RANKS, 2>(Normed{x, w, eps, 0.f}, out, rows, items, low, k, rank_max, count, SITES);
}
#define ACTIVATED(Curve, curve)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                  \
        adapters_activated_##curve##_bf16(const bf16* x, int gated, OUT_PARAMETERS) {                      \
        wait_for_earlier_kernels();                                                                        \
        make_and_shrink<ACTIVATED_RANKS, 4>(Activated<Curve>{x, k, gated}, out, rows, items, low, k, rank_max, count, SITES); \
    }
ACTIVATED(Silu, silu)
ACTIVATED(GeluTanh, gelu_tanh)
ACTIVATED(GeluErf, gelu_erf)
