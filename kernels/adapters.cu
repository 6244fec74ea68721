// Adds several adapters to the rows of a step: y[row] += sum of strength * scale * (x[row] A^T) B^T, each row
// with adapters and strengths of its own; the twin of src/ops/adapters.rs.
//
// `shrink` makes x A^T of all items and of up to three layers that read the same x. A product of few rows adds the rest
// where it writes y (matmul.cu). Behind another product, `expand` adds what a row's items make of it, in their order,
// and rounds once. Nothing depends on other rows.
#include "adapters.cuh"

// Layers side by side: their numbers, where their columns begin in y, and how many they have.
#define SITES_PARAMETERS int site_0, int site_1, int site_2
#define PARTS_PARAMETERS SITES_PARAMETERS, int at_0, int at_1, int at_2, int n_0, int n_1, int n_2
#define PICK(name) (blockIdx.z == 0 ? name##_0 : blockIdx.z == 1 ? name##_1 : name##_2)

// Ranks of a block, and its threads: all of them share the sum over k, since few blocks are busy if a step has few rows.
constexpr int RANKS = 2, THREADS = 256;

// blockIdx.y is the item, a block makes RANKS of its values: low [part, item, rank_max]. The order of a sum depends
// on k alone.
template <typename T>
__device__ __forceinline__ void shrink(const T* x, const uint32_t* items, float* low, int k, int rank_max, SITES_PARAMETERS) {
    SHARED_ARRAY(float, parts, THREADS / 32 * RANKS);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first = blockIdx.x * RANKS;
    const Item item(items + 4 * (uint64_t)blockIdx.y);
    if (item.table == nullptr) return;  // it fills the list up
    const Pair pair(item.table, PICK(site));
    if (first >= pair.rank) return;  // the whole block leaves
    x += (uint64_t)item.row * k;
    const T* a[RANKS];
#pragma unroll
    for (int j = 0; j < RANKS; ++j) a[j] = reinterpret_cast<const T*>(pair.a) + (uint64_t)min(first + j, pair.rank - 1) * k;
    float sums[RANKS] = {};
    if (k % 8 == 0) {
        for (int i = threadIdx.x * 8; i < k; i += THREADS * 8) {
            Eight<T> left, right[RANKS];
            left.load(x + i);
#pragma unroll
            for (int j = 0; j < RANKS; ++j) right[j].load(a[j] + i);
#pragma unroll
            for (int j = 0; j < RANKS; ++j)
#pragma unroll
                for (int e = 0; e < 8; ++e) sums[j] = fmaf(left.v[e], right[j].v[e], sums[j]);
        }
    } else {
        for (int i = threadIdx.x; i < k; i += THREADS) {
#pragma unroll
            for (int j = 0; j < RANKS; ++j) sums[j] = fmaf(widen(x[i]), widen(a[j][i]), sums[j]);
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
    low[((uint64_t)blockIdx.z * gridDim.y + blockIdx.y) * rank_max + rank] = sum;
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
#define FOR(T, type)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS) adapters_shrink_##type(                                         \
        const T* x, const uint32_t* items, float* low, int k, int rank_max, SITES_PARAMETERS) {                           \
        shrink<T>(x, items, low, k, rank_max, SITES);                                                                     \
    }                                                                                                                     \
    extern "C" __global__ void adapters_expand_##type(const float* low, const uint32_t* items, const uint32_t* rows,      \
                                                      T* y, int stride, int count, int rank_max, float factor,            \
                                                      PARTS_PARAMETERS) {                                                 \
        expand<T>(low, items, rows, y, stride, count, rank_max, factor, PARTS);                                           \
    }
FOR(float, f32)
FOR(bf16, bf16)
