// Adds several adapters to the rows of a step: y[row] += sum of strength * scale * (x[row] A^T) B^T, each row
// with adapters and strengths of its own; the twin of src/ops/adapters.rs.
//
// An item is an adapter on a row. `shrink` makes x A^T of all items and of up to three layers that read the same
// x, `expand` adds what a row's items make of it, in their order, and rounds once. Nothing depends on other rows.
#include "common.cuh"

// Layers side by side: their numbers, where their columns begin in y, and how many they have.
#define SITES_PARAMETERS int site_0, int site_1, int site_2
#define PARTS_PARAMETERS SITES_PARAMETERS, int at_0, int at_1, int at_2, int n_0, int n_1, int n_2
#define PICK(name) (blockIdx.z == 0 ? name##_0 : blockIdx.z == 1 ? name##_1 : name##_2)

// One layer's pair in an adapter's table: the addresses of A [rank, k] and B [n, rank], the rank (0: no pair) and
// the scale. Before the first layer's entry stands the number of layers; those beyond have no pair.
struct Pair {
    uint64_t a, b;
    int rank;
    float scale;
    __device__ __forceinline__ Pair(const uint32_t* table, int site) {
        a = b = 0, rank = 0, scale = 0.f;
        if (site >= (int)table[0]) return;
        const uint32_t* entry = table + 8 * (uint64_t)(site + 1);
        a = entry[0] | (uint64_t)entry[1] << 32, b = entry[2] | (uint64_t)entry[3] << 32;
        rank = (int)entry[4], scale = __uint_as_float(entry[5]);
    }
};

// An adapter on a row: the address of its table, the row, the strength.
struct Item {
    const uint32_t* table;
    int row;
    float strength;
    __device__ __forceinline__ explicit Item(const uint32_t* item)
        : table(reinterpret_cast<const uint32_t*>(item[0] | (uint64_t)item[1] << 32)),
          row((int)item[2]),
          strength(__uint_as_float(item[3])) {}
};

// blockIdx.y is the item, a warp makes one of its values: low [part, item, rank_max].
template <typename T>
__device__ __forceinline__ void shrink(const T* x, const uint32_t* items, float* low, int k, int rank_max, SITES_PARAMETERS) {
    const int lane = threadIdx.x & 31, r = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    const Item item(items + 4 * (uint64_t)blockIdx.y);
    if (item.table == nullptr) return;  // it fills the list up
    const Pair pair(item.table, PICK(site));
    if (r >= pair.rank) return;  // a whole warp leaves
    x += (uint64_t)item.row * k;
    const T* a = reinterpret_cast<const T*>(pair.a) + (uint64_t)r * k;
    float sum = 0.f;
    if (k % 8 == 0) {
        for (int i = lane * 8; i < k; i += 256) {
            Eight<T> left, right;
            left.load(x + i), right.load(a + i);
#pragma unroll
            for (int e = 0; e < 8; ++e) sum = fmaf(left.v[e], right.v[e], sum);
        }
    } else {
        for (int i = lane; i < k; i += 32) sum = fmaf(widen(x[i]), widen(a[i]), sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) low[((uint64_t)blockIdx.z * gridDim.y + blockIdx.y) * rank_max + r] = sum;
}

// blockIdx.y is a row that has items, (row, its first item, how many); a thread takes a column.
template <typename T>
__device__ __forceinline__ void expand(const float* low, const uint32_t* items, const uint32_t* rows, T* y, int stride, int count,
                                       int rank_max, float factor, PARTS_PARAMETERS) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= PICK(n)) return;
    const uint32_t* own = rows + 3 * (uint64_t)blockIdx.y;
    if (own[2] == 0) return;  // it fills the list up
    float total = 0.f;
    for (uint32_t i = own[1]; i < own[1] + own[2]; ++i) {
        const Item item(items + 4 * (uint64_t)i);
        const Pair pair(item.table, PICK(site));
        const T* b = reinterpret_cast<const T*>(pair.b) + (uint64_t)column * pair.rank;
        const float* from = low + ((uint64_t)blockIdx.z * count + i) * rank_max;
        float sum = 0.f;
        if (pair.rank % 8 == 0) {
            for (int r = 0; r < pair.rank; r += 8) {
                Eight<T> values;
                values.load(b + r);
#pragma unroll
                for (int e = 0; e < 8; ++e) sum = fmaf(from[r + e], values.v[e], sum);
            }
        } else {
            for (int r = 0; r < pair.rank; ++r) sum = fmaf(from[r], widen(b[r]), sum);
        }
        total = fmaf(item.strength * pair.scale * factor, sum, total);
    }
    T* to = y + (uint64_t)own[0] * stride + PICK(at) + column;
    *to = narrow<T>(widen(*to) + total);
}

#define SITES site_0, site_1, site_2
#define PARTS SITES, at_0, at_1, at_2, n_0, n_1, n_2
#define FOR(T, type)                                                                                                      \
    extern "C" __global__ void adapters_shrink_##type(const T* x, const uint32_t* items, float* low, int k, int rank_max, \
                                                      SITES_PARAMETERS) {                                                 \
        wait_for_earlier_kernels();                                                                                       \
        shrink<T>(x, items, low, k, rank_max, SITES);                                                                     \
    }                                                                                                                     \
    extern "C" __global__ void adapters_expand_##type(const float* low, const uint32_t* items, const uint32_t* rows,      \
                                                      T* y, int stride, int count, int rank_max, float factor,            \
                                                      PARTS_PARAMETERS) {                                                 \
        wait_for_earlier_kernels();                                                                                       \
        expand<T>(low, items, rows, y, stride, count, rank_max, factor, PARTS);                                           \
    }
FOR(float, f32)
FOR(bf16, bf16)
