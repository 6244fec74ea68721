// Adds several adapters to the rows of a step: y[row] += sum of strength * scale * (x[row] A^T) B^T, each row
// with adapters and strengths of its own; the twin of src/ops/adapters.rs.
//
// `shrink` makes x A^T of all items and of up to three layers that read the same x; `norm` and `activated` make x, too.
// A product of few rows adds the rest where it writes y (matmul.cu). Behind another product, `expand` adds what a row's
// items make of it, in their order, and rounds once. Nothing depends on other rows.
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
    static constexpr bool ANY_WIDTH = true;
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
    static constexpr bool ANY_WIDTH = false;
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
    static constexpr bool ANY_WIDTH = false;
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

// blockIdx.y is the item, a block makes RANKS of its values: low [part, item, rank_max]. The order of a sum depends
// on k alone.
template <typename T, int RANKS, typename Source>
__device__ __forceinline__ void shrink(Source x, const uint32_t* items, float* low, int k, int rank_max, int count,
                                       SITES_PARAMETERS) {
    SHARED_ARRAY(float, parts, THREADS / 32 * RANKS);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first = blockIdx.x * RANKS;
    const Item item(items + 4 * (uint64_t)blockIdx.y);
    if (item.table == nullptr) return;  // it fills the list up
    const Pair pair(item.table, PICK(site));
    if (first >= pair.rank) return;  // the whole block leaves
    x.begin(item.row, k);
    const T* a[RANKS];
#pragma unroll
    for (int j = 0; j < RANKS; ++j) a[j] = reinterpret_cast<const T*>(pair.a) + (uint64_t)min(first + j, pair.rank - 1) * k;
    float sums[RANKS] = {};
    if (!Source::ANY_WIDTH || k % 8 == 0) {
        for (int i = threadIdx.x * 8; i < k; i += THREADS * 8) {
            Eight<T> right[RANKS];
#pragma unroll
            for (int j = 0; j < RANKS; ++j) right[j].load(a[j] + i);
            const Eight<T> left = x.eight(i);
#pragma unroll
            for (int j = 0; j < RANKS; ++j)
#pragma unroll
                for (int e = 0; e < 8; ++e) sums[j] = fmaf(left.v[e], right[j].v[e], sums[j]);
        }
    } else {
        for (int i = threadIdx.x; i < k; i += THREADS) {
#pragma unroll
            for (int j = 0; j < RANKS; ++j) sums[j] = fmaf(x.one(i), widen(a[j][i]), sums[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < RANKS; ++j) {
        sums[j] = warp_sum(sums[j]);
        if (lane == 0) parts[warp * RANKS + j] = sums[j];
    }
    __syncthreads();
    const int rank = first + threadIdx.x;
    if (threadIdx.x >= RANKS || rank >= pair.rank) return;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) sum += parts[i * RANKS + threadIdx.x];
    low[((uint64_t)blockIdx.z * count + blockIdx.y) * rank_max + rank] = sum;
}

// The same of an input that is not there yet: blocks beyond the items write it to out [rows, k], a row each.
template <int RANKS, typename Source>
__device__ __forceinline__ void make_and_shrink(Source x, bf16* out, int rows, const uint32_t* items, float* low, int k,
                                                int rank_max, int count, SITES_PARAMETERS) {
    if ((int)blockIdx.y < count) {
        shrink<bf16, RANKS>(x, items, low, k, rank_max, count, site_0, site_1, site_2);
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
// Ranks of a block: more of them read x less often, fewer make more blocks. src/ops/adapters.rs repeats both.
constexpr int READ_RANKS = 2, MADE_RANKS = 4;

#define FOR(T, type)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS) adapters_shrink_##type(                                         \
        const T* x, const uint32_t* items, float* low, int k, int rank_max, SITES_PARAMETERS) {                           \
        shrink<T, READ_RANKS>(AsItIs<T>{x}, items, low, k, rank_max, gridDim.y, SITES);                                   \
    }                                                                                                                     \
    extern "C" __global__ void adapters_expand_##type(const float* low, const uint32_t* items, const uint32_t* rows,      \
                                                      T* y, int stride, int count, int rank_max, float factor,            \
                                                      PARTS_PARAMETERS) {                                                 \
        expand<T>(low, items, rows, y, stride, count, rank_max, factor, PARTS);                                           \
    }
FOR(float, f32)
FOR(bf16, bf16)

#define OUT_PARAMETERS bf16 *out, const uint32_t *items, float *low, int rows, int k, int rank_max, int count, SITES_PARAMETERS
extern "C" __global__ void __launch_bounds__(THREADS)
    adapters_norm_bf16(const bf16* x, const float* w, float eps, OUT_PARAMETERS) {
    make_and_shrink<MADE_RANKS>(Normed{x, w, eps, 0.f}, out, rows, items, low, k, rank_max, count, SITES);
}
#define ACTIVATED(Curve, curve)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                  \
        adapters_activated_##curve##_bf16(const bf16* x, int gated, OUT_PARAMETERS) {                      \
        make_and_shrink<MADE_RANKS>(Activated<Curve>{x, k, gated}, out, rows, items, low, k, rank_max, count, SITES); \
    }
ACTIVATED(Silu, silu)
ACTIVATED(GeluTanh, gelu_tanh)
ACTIVATED(GeluErf, gelu_erf)
