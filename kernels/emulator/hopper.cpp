// The units that run beside the threads of a block: barriers with phases, copies of boxes, products of warpgroups.
//
// PTX ISA, "mbarrier", "cp.async.bulk.tensor" and "wgmma"; the layouts of operands in shared memory are those that
// CUTLASS states as formulas in mma_traits_sm90_gmma.hpp.
#include "hopper.h"

#include <algorithm>
#include <cstdio>

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulator {
namespace {

const uint64_t barrier_mark = uint64_t{0x6d626172} << 32;
const uint32_t running_bits = 0x7fc0f00d; // a NaN that stands in results until they are waited for

enum class What { copy, product };

// Whether the next copy, or the next product's reads, happen as early as they may. Order 0 has early copies and late
// products, which shows a stage that is filled too early; order 1 the opposite, which shows a missing wait.
bool early(What what) {
    if (block->order < 2) return (block->order == 0) == (what == What::copy);
    uint64_t x = (++block->choices + static_cast<uint64_t>(block->order) * 0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9;
    return (x >> 40 & 1) != 0;
}

PhaseBarrier& phases_at(const uint64_t* at) {
    if (!is_shared(at, 8) || reinterpret_cast<uintptr_t>(at) % 8 != 0) die("a barrier at %p: expected eight aligned bytes of shared memory", static_cast<const void*>(at));
    const uint64_t number = *at ^ barrier_mark;
    if (number >= block->phases.size() || block->phases[number].at != at) die("a barrier that barrier_init did not make, or that was overwritten");
    PhaseBarrier& barrier = block->phases[number];
    if (!barrier.made) die("a barrier is used before barriers_are_made");
    return barrier;
}

// The place of a byte with the swizzle, from its place without one.
uint64_t swizzled(uint64_t address, uint32_t row_bytes) {
    return address ^ (address >> 7 & (row_bytes == 128 ? 7 : row_bytes == 64 ? 3 : 0)) << 4;
}

uint64_t bytes_of(const Transfer& transfer) { return uint64_t{2} * transfer.map.box_columns * transfer.map.box_rows; }

void carry_out(Transfer& transfer) {
    if (transfer.done) return;
    transfer.done = true;
    const TensorMapBits& map = transfer.map;
    const uint64_t to = reinterpret_cast<uint64_t>(transfer.to);
    for (uint32_t i = 0; i < map.box_rows; ++i) {
        for (uint32_t j = 0; j < map.box_columns; ++j) {
            const int64_t row = int64_t{transfer.y} + i, column = int64_t{transfer.x} + j;
            const bool inside = row >= 0 && row < map.rows && column >= 0 && column < map.columns;
            const uint16_t* from = reinterpret_cast<const uint16_t*>(map.base + static_cast<uint64_t>(row) * map.row_bytes) + column;
            const uint64_t place = to + 2 * (uint64_t{i} * map.box_columns + j);
            *reinterpret_cast<uint16_t*>(swizzled(place, map.swizzle)) = inside ? *from : uint16_t{0};
        }
    }
    if (after_asynchronous_write != nullptr) after_asynchronous_write(transfer.to, bytes_of(transfer));
}

// Ends the phase if nothing is missing. Bytes come when somebody waits for them.
void advance(PhaseBarrier& barrier) {
    if (barrier.pending != 0) return;
    uint64_t bytes = 0;
    for (const Transfer& transfer : barrier.transfers) bytes += bytes_of(transfer);
    if (bytes > barrier.expected_bytes) die("copies of %llu bytes for a barrier's phase that expects %llu", (unsigned long long)bytes, (unsigned long long)barrier.expected_bytes);
    if (bytes < barrier.expected_bytes || (bytes > 0 && barrier.waiters == 0)) return;
    for (Transfer& transfer : barrier.transfers) carry_out(transfer);
    barrier.transfers.clear();
    barrier.expected_bytes = 0;
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
    const unsigned number = static_cast<unsigned>(&barrier - block->phases.data());
    for (Thread& t : block->threads) {
        if (t.state == State::at_phase && t.waits_for == number) t.state = State::ready;
    }
}

struct Matrix {
    uint64_t start, leading, stride;
    uint32_t row_bytes;
};

// Finds the bytes that a descriptor means: it has the lowest 18 bits of an address, and shared memory is shorter than
// that.
Matrix matrix_of(uint64_t descriptor) {
    const uint64_t memory = reinterpret_cast<uint64_t>(shared_dynamic());
    const uint64_t swizzle = descriptor >> 62;
    if (swizzle != 1 && swizzle != 2) die("a matrix descriptor with swizzle %d: expected 1 (128 bytes) or 2 (64)", (int)swizzle);
    if ((descriptor & 0x3fffc000c000c000) != 0) die("a matrix descriptor with reserved bits or a base offset: %llx", (unsigned long long)descriptor);
    const uint64_t start = memory + ((((descriptor & 0x3fff) << 4) - memory) & 0x3ffff);
    return {start, (descriptor >> 16 & 0x3fff) << 4, (descriptor >> 32 & 0x3fff) << 4, swizzle == 1 ? 128u : 64u};
}

// Eight neighbouring elements of a row, which are one 16-byte piece.
void read_piece(const Matrix& matrix, uint64_t place, float* to, size_t stride) {
    const uint16_t* piece = reinterpret_cast<const uint16_t*>(swizzled(place, matrix.row_bytes));
    if (!is_shared(piece, 16)) die("a product reads outside the block's shared memory");
    if (before_asynchronous_read != nullptr) before_asynchronous_read(piece, 16);
    for (int i = 0; i < 8; ++i) to[static_cast<size_t>(i) * stride] = lower_half(piece[i]);
}

// Row `i` of a matrix whose rows lie along the contraction; 16 elements of a row lie in one panel.
void read_along(const Matrix& m, unsigned i, float* to, size_t stride) {
    for (unsigned k = 0; k < 16; k += 8)
        read_piece(m, m.start + i / 8 * m.stride + i % 8 * m.row_bytes + 2 * k, to + k * stride, stride);
}

// Columns `n` to `n` + 7 of row `k` of a matrix that is read across its rows.
void read_across(const Matrix& m, unsigned k, unsigned n, float* to) {
    const unsigned columns = m.row_bytes / 2;
    read_piece(m, m.start + n / columns * m.leading + k / 8 * m.stride + k % 8 * m.row_bytes + 2 * (n % columns), to, 1);
}

void read_operands(RunningProduct& product, unsigned quarter) {
    if (product.read) return;
    product.read = true;
    product.a_values.resize(16 * 16);
    product.b_values.resize(static_cast<size_t>(16) * product.columns);
    if (product.left[0] != nullptr) {
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                float* pair = &product.a_values[(lane / 4 + 8 * (i % 2)) * 16 + 2 * (lane % 4) + 8 * (i / 2)];
                pair[0] = lower_half(product.left_bits[lane][i]), pair[1] = upper_half(product.left_bits[lane][i]);
            }
    } else {
        const Matrix a = matrix_of(product.a);
        for (unsigned i = 0; i < 16; ++i) read_along(a, 16 * quarter + i, &product.a_values[i * 16], 1);
    }
    const Matrix b = matrix_of(product.b);
    const unsigned columns = static_cast<unsigned>(product.columns);
    if (product.across_rows) {
        for (unsigned k = 0; k < 16; ++k)
            for (unsigned n = 0; n < columns; n += 8) read_across(b, k, n, &product.b_values[k * columns + n]);
    } else {
        for (unsigned n = 0; n < columns; ++n) read_along(b, n, &product.b_values[n], columns);
    }
}

void multiply(const RunningProduct& product, Accumulator& accumulator) {
    const int columns = product.columns;
    std::vector<float> sums(static_cast<size_t>(16) * columns, 0.f);
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k) {
            const float a = product.a_values[i * 16 + k];
            const float* b = &product.b_values[static_cast<size_t>(k) * columns];
            float* sum = &sums[static_cast<size_t>(i) * columns];
            for (int n = 0; n < columns; ++n) sum[n] += a * b[n];
        }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < accumulator.count; ++i) {
            float& value = accumulator.values[static_cast<size_t>(lane) * accumulator.count + i];
            const float sum = sums[static_cast<size_t>(lane / 4 + i % 4 / 2 * 8) * columns + i / 4 * 8 + 2 * (lane % 4) + i % 2];
            value = product.accumulate ? value + sum : sum;
        }
}

// Gives lanes their results if no product works on them any more.
void give_back(Products& products, Accumulator& accumulator) {
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < accumulator.count; ++i) {
            if (emulator_bits<uint32_t>(accumulator.d[lane][i]) != running_bits) die("lane %d wrote a result of a product that was running", lane);
            accumulator.d[lane][i] = accumulator.values[static_cast<size_t>(lane) * accumulator.count + i];
        }
    products.accumulators.erase(products.accumulators.begin() + (&accumulator - products.accumulators.data()));
}

Accumulator& accumulator_of(Products& products, float* result) {
    for (Accumulator& accumulator : products.accumulators) {
        if (accumulator.d[0] == result) return accumulator;
    }
    die("a product without its results");
}

Accumulator new_accumulator(void* const operands[32], int count) {
    Accumulator accumulator = {};
    accumulator.count = count;
    accumulator.values.resize(static_cast<size_t>(32) * count);
    for (int lane = 0; lane < 32; ++lane) {
        accumulator.d[lane] = static_cast<ProductIssue*>(operands[lane])->d;
        for (int i = 0; i < count; ++i) {
            accumulator.values[static_cast<size_t>(lane) * count + i] = accumulator.d[lane][i];
            accumulator.d[lane][i] = emulator_bits<float>(running_bits);
        }
    }
    return accumulator;
}

}  // namespace

void init_phases(uint64_t* at, uint32_t arrivals) {
    if (!is_shared(at, 8) || reinterpret_cast<uintptr_t>(at) % 8 != 0) die("barrier_init: expected eight aligned bytes of shared memory");
    if (arrivals == 0 || arrivals >= 1u << 20) die("barrier_init: %u arrivals", arrivals);
    PhaseBarrier barrier = {};
    barrier.at = at;
    barrier.arrivals = barrier.pending = arrivals;
    *at = block->phases.size() | barrier_mark;
    block->phases.push_back(barrier);
}

void phases_are_made() {
    for (PhaseBarrier& barrier : block->phases) barrier.made = true;
}

void arrive(uint64_t* at, uint32_t bytes) {
    PhaseBarrier& barrier = phases_at(at);
    if (block->gave_up) return;
    if (barrier.pending == 0) die("an arrival at a barrier whose %u arrivals are there", barrier.arrivals);
    --barrier.pending;
    barrier.expected_bytes += bytes;
    if (keeps_order) release_order(barrier.known);
    advance(barrier);
}

void wait_for_phase(uint64_t* at, uint32_t parity, bool patient, const Site* site) {
    PhaseBarrier& barrier = phases_at(at);
    if (parity > 1) die("%s: parity %u", site->what, parity);
    if (block->gave_up) return;
    Thread* me = thread;
    me->waits_for = static_cast<unsigned>(&barrier - block->phases.data());
    me->parity = parity;
    me->patient = patient;
    ++barrier.waiters;
    if ((barrier.phase & 1) == parity) {
        advance(barrier);
        if ((barrier.phase & 1) == parity) park(State::at_phase, site);
    }
    --barrier.waiters;
    if (keeps_order) acquire_order(barrier.known);
}

void load_box(void* to, const TensorMap* map, uint64_t* at, int x, int y) {
    check_waited("copies a box of global memory");
    PhaseBarrier& barrier = phases_at(at);
    Transfer transfer = {};
    memcpy(&transfer.map, map->bytes, sizeof transfer.map);
    if (transfer.map.mark != tensor_map_mark) die("a copy with a tensor map that cuTensorMapEncodeTiled did not write");
    transfer.to = static_cast<unsigned char*>(to);
    transfer.x = x, transfer.y = y;
    if (reinterpret_cast<uintptr_t>(to) % 128 != 0) die("a copy to %p: expected a multiple of 128", to);
    if (!is_shared(to, bytes_of(transfer))) die("a copy's box does not lie in the block's shared memory");
    if (block->gave_up || early(What::copy)) carry_out(transfer);
    if (block->gave_up) return;
    barrier.transfers.push_back(transfer);
    advance(barrier);
}

void wait_at_number(int number, int threads, const Site* site) {
    if (number < 1 || number > 15) die("%s: number %d, expected 1 to 15", site->what, number);
    if (threads <= 0 || threads % 32 != 0) die("%s: %d threads, expected whole warps", site->what, threads);
    NamedBarrier& barrier = block->named[number];
    if (barrier.arrived == 0) barrier.threads = static_cast<unsigned>(threads), barrier.known.clear();
    if (barrier.threads != static_cast<unsigned>(threads)) die("%s %d: %d threads, others say %u", site->what, number, threads, barrier.threads);
    Thread* me = thread;
    if (keeps_order) release_order(barrier.known);
    me->waits_for = static_cast<unsigned>(number);
    if (++barrier.arrived < barrier.threads) {
        park(State::at_named, site);
    } else {
        barrier.arrived = 0;
        for (Thread& t : block->threads) {
            if (t.state != State::at_named || t.waits_for != static_cast<unsigned>(number)) continue;
            t.state = State::ready;
            if (!keeps_order) continue;
            thread = &t;
            acquire_order(barrier.known);
        }
        thread = me;
        if (keeps_order) acquire_order(barrier.known);
    }
}

void issue_product(void* const operands[32]) {
    check_all_lanes(operands, "wgmma");
    const unsigned warp = thread->linear / 32;
    Products& products = block->products[warp];
    const ProductIssue& first = *static_cast<ProductIssue*>(operands[0]);
    RunningProduct product = {};
    product.a = first.a, product.b = first.b;
    product.columns = first.columns;
    product.accumulate = first.accumulate, product.across_rows = first.across_rows;
    product.group = block->threads[warp * 32].product_groups;
    product.result = first.d;
    for (int lane = 0; lane < 32; ++lane) {
        const ProductIssue& mine = *static_cast<ProductIssue*>(operands[lane]);
        if (mine.a != first.a || mine.b != first.b) die("wgmma: lanes 0 and %d have different descriptors", lane);
        if (!block->threads[warp * 32 + lane].fenced) die("wgmma: lane %d used registers since the last wgmma_fence", lane);
        product.left[lane] = mine.left;
        if (mine.left != nullptr) memcpy(product.left_bits[lane], mine.left, sizeof product.left_bits[lane]);
    }
    const bool known = std::any_of(products.accumulators.begin(), products.accumulators.end(),
                                   [&](const Accumulator& accumulator) { return accumulator.d[0] == first.d; });
    if (!known) products.accumulators.push_back(new_accumulator(operands, first.columns / 2));
    ++accumulator_of(products, first.d).running;
    if (early(What::product)) read_operands(product, warp % 4);
    products.running.push_back(std::move(product));
    ++products.issued;
}

void finish_products(void* const operands[32]) {
    check_all_lanes(operands, "wgmma_wait");
    const unsigned warp = thread->linear / 32;
    Products& products = block->products[warp];
    const unsigned left = static_cast<unsigned>(*static_cast<int*>(operands[0]));
    const unsigned committed = block->threads[warp * 32].product_groups;
    size_t done = 0;
    for (; done < products.running.size() && products.running[done].group + left < committed; ++done) {
        RunningProduct& product = products.running[done];
        for (int lane = 0; lane < 32; ++lane) {
            if (product.left[lane] != nullptr && memcmp(product.left_bits[lane], product.left[lane], sizeof product.left_bits[lane]) != 0)
                die("lane %d changed its part of A while a product was running", lane);
        }
        read_operands(product, warp % 4);
        Accumulator& accumulator = accumulator_of(products, product.result);
        multiply(product, accumulator);
        if (--accumulator.running == 0) give_back(products, accumulator);
    }
    products.running.erase(products.running.begin(), products.running.begin() + static_cast<ptrdiff_t>(done));
}

void describe_wait(const Thread& waiting) {
    if (waiting.state == State::at_named) {
        const NamedBarrier& barrier = block->named[waiting.waits_for];
        fprintf(stderr, " %s %u, %s:%d: %u of %u threads are there", waiting.site->what, waiting.waits_for, waiting.site->file,
                waiting.site->line, barrier.arrived, barrier.threads);
        return;
    }
    const PhaseBarrier& barrier = block->phases[waiting.waits_for];
    uint64_t bytes = 0;
    for (const Transfer& transfer : barrier.transfers) bytes += bytes_of(transfer);
    fprintf(stderr, " %s, %s:%d: barrier %u in phase %llu lacks %u arrivals and has copies of %llu of %llu bytes", waiting.site->what,
            waiting.site->file, waiting.site->line, waiting.waits_for, (unsigned long long)barrier.phase, barrier.pending,
            (unsigned long long)bytes, (unsigned long long)barrier.expected_bytes);
}

void begin_asynchronous(Block& running) {
    const size_t threads = running.threads.size(), warps = (threads + 31) / 32;
    running.phases.clear();
    running.choices = running.serial;
    running.gave_up = false;
    for (NamedBarrier& barrier : running.named) barrier.arrived = 0;
    running.products.resize(warps);
    for (Products& products : running.products) products.issued = 0, products.running.clear(), products.accumulators.clear();
    for (Thread& t : running.threads) {
        t.fenced = false;
        t.product_groups = 0;
        t.waits_for = 0;
        if (!keeps_order) continue;
        t.known.assign(threads, 0);
        t.known[t.linear] = 1;
    }
}

void end_asynchronous(const Block& running) {
    for (size_t first = 0; first + 4 <= running.products.size(); first += 4)
        for (size_t warp = first; warp < first + 4; ++warp) {
            if (running.products[warp].issued != running.products[first].issued) {
                die("warps %zu and %zu of a warpgroup had %u and %u products", first, warp, running.products[first].issued, running.products[warp].issued);
            }
            if (!running.products[warp].running.empty()) die("warp %zu returned while its products were running", warp);
        }
}

void release_order(std::vector<uint32_t>& known) {
    known.resize(std::max(known.size(), thread->known.size()), 0);
    for (size_t i = 0; i < thread->known.size(); ++i) known[i] = std::max(known[i], thread->known[i]);
    ++thread->known[thread->linear];
}

void acquire_order(const std::vector<uint32_t>& known) {
    for (size_t i = 0; i < known.size(); ++i) thread->known[i] = std::max(thread->known[i], known[i]);
}

}  // namespace emulator
