// Adapters on the rows of a step: the lists that kernels read, and the sum that a product of few rows adds to its
// output. src/ops/adapters.rs writes the lists.
//
// An item is an adapter on a row. `low` [part, item, rank_max] is x A^T of all items, for up to three layers that read
// the same x. A row's entry in `rows` is (row, its first item, how many); its items lie together, in their order.
#pragma once
#include "common.cuh"

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

// An adapter on a row: the address of its table (null: it fills the list up), the row, the strength.
struct Item {
    const uint32_t* table;
    int row;
    float strength;
    __device__ __forceinline__ explicit Item(const uint32_t* item)
        : table(reinterpret_cast<const uint32_t*>(item[0] | (uint64_t)item[1] << 32)),
          row((int)item[2]),
          strength(__uint_as_float(item[3])) {}
};

// The sum over a column's ranks of low[r] * b[r]. `low` begins at a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ float through_b(const float* low, const T* b, int rank) {
    float sum = 0.f;
    if (rank % 8 == 0) {
        for (int r = 0; r < rank; r += 8) {
            Eight<float> left;
            Eight<T> right;
            left.load(low + r), right.load(b + r);
#pragma unroll
            for (int e = 0; e < 8; ++e) sum = fmaf(left.v[e], right.v[e], sum);
        }
    } else {
        for (int r = 0; r < rank; ++r) sum = fmaf(low[r], widen(b[r]), sum);
    }
    return sum;
}

// Asks for the line of memory that holds an address, which is read later.
__device__ __forceinline__ void read_ahead(const void* address) {
#ifdef CUDA_EMU
    (void)address;
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// The part of a product of few rows without adapters: it adds nothing to the output.
struct Nothing {
    __device__ __forceinline__ void find(int, int, int) const {}
    __device__ __forceinline__ float onto(float value, int, int) const { return value; }
};

// A row's first item, whose pair is looked up while the product computes.
struct First {
    uint64_t b;
    uint32_t item, items;
    int rank;
    float factor;
};

// The sum that the adapters on the rows of one layer's product add. `rows` has an entry for each row, in order.
template <typename T>
struct Added {
    const float* low;
    const uint32_t *items, *rows;
    int rank_max, site;
    float factor;
    First* firsts;  // in shared memory, one a row
    static constexpr int LINE = 128, LINES_MAX = 16;

    // Looks up the first items of m rows, at most as many as threads; a barrier must follow before `onto`. The block
    // owns `columns` columns from `column` on.
    __device__ __forceinline__ void find(int m, int column, int columns) const {
        if ((int)threadIdx.x >= m) return;
        const uint32_t* row = rows + 3 * (uint64_t)threadIdx.x;
        First first = {0, row[1], row[2], 0, 0.f};
        if (first.items > 0) {
            const Item item(items + 4 * (uint64_t)first.item);
            const Pair pair(item.table, site);
            first.b = pair.b, first.rank = pair.rank, first.factor = item.strength * pair.scale * factor;
            const char* from = reinterpret_cast<const char*>(pair.b) + (uint64_t)column * pair.rank * sizeof(T);
            const int bytes = min(columns * pair.rank * (int)sizeof(T), LINE * LINES_MAX);
            for (int at = 0; at < bytes; at += LINE) read_ahead(from + at);
        }
        firsts[threadIdx.x] = first;
    }

    // The product's value plus the sums of the row's items, in their order.
    __device__ __forceinline__ float onto(float value, int row, int column) const {
        const First first = firsts[row];
        if (first.items == 0) return value;
        const T* b = reinterpret_cast<const T*>(first.b);
        const float* from = low + (uint64_t)first.item * rank_max;
        float total = __fmul_rn(first.factor, through_b(from, b + (uint64_t)column * first.rank, first.rank));
        for (uint32_t i = 1; i < first.items; ++i) {
            const Item item(items + 4 * (uint64_t)(first.item + i));
            const Pair pair(item.table, site);
            b = reinterpret_cast<const T*>(pair.b), from += rank_max;
            const float sum = through_b(from, b + (uint64_t)column * pair.rank, pair.rank);
            total = __fmaf_rn(item.strength * pair.scale * factor, sum, total);
        }
        // A sum of zero is not added, so that -0 stays -0. A row whose adapter has no pair gets the same bits, and may
        // take another kernel.
        return total == 0.f ? value : __fadd_rn(value, total);
    }
};
