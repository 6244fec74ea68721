// libcublasLt: descriptions of matrices, the choice of an algorithm, and the product.
//
// An algorithm holds what it was chosen for. A product that uses it for anything else ends the process: another shape,
// an address with less alignment than was promised, or a workspace that is too small. So does a result that overlaps an
// operand.
#include <algorithm>
#include <cstring>

#include "blas.h"
#include "graphs.h"
#include "streams.h"

using namespace fake;

#define API EXPORT int

namespace {

// cublasLtMatmulMatrixScale_t, as far as it is used: one number for all, or one for each row of a and each column of b.
enum ScaleMode { scale_scalar = 0, scale_outer_vector = 3 };

struct Description {
    int compute, scale;
    int a_operation = 0, b_operation = 0;
    int a_scale_mode = scale_scalar, b_scale_mode = scale_scalar;
    const float *a_scales = nullptr, *b_scales = nullptr;
    signed char fast_sums = 0;
};
struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t leading;
};
struct Preference {
    uint64_t workspace_bytes = 0;
    uint32_t alignments[4] = {256, 256, 256, 256};  // a, b, c, d
};

// cublasLtMatmulAlgo_t has 64 bytes.
struct Algorithm {
    uint64_t shape;  // a hash
    uint64_t workspace_bytes;
    uint32_t alignments[4];
    uint64_t unused[4];
};
static_assert(sizeof(Algorithm) == 64, "as the library has it");

// cublasLtMatmulHeuristicResult_t.
struct Heuristic {
    Algorithm algorithm;
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};

uint64_t mixed(uint64_t hash, uint64_t value) { return (hash ^ value) * 0x100000001b3u + (hash >> 29); }

uint64_t shape_of(const Description& description, std::initializer_list<const Layout*> layouts) {
    uint64_t hash = mixed(mixed(0xcbf29ce484222325u, static_cast<uint64_t>(description.a_operation)), static_cast<uint64_t>(description.b_operation));
    for (const int value : {description.a_scale_mode, description.b_scale_mode, int{description.fast_sums}}) hash = mixed(hash, static_cast<uint64_t>(value));
    for (const Layout* layout : layouts)
        for (const uint64_t value : {static_cast<uint64_t>(layout->type), layout->rows, layout->columns, static_cast<uint64_t>(layout->leading)})
            hash = mixed(hash, value);
    return hash;
}

// Products of few results and long sums are cut into parts, which need memory.
uint64_t wanted_workspace(const Layout& d, uint64_t k) { return k >= 4 * std::min(d.rows, d.columns) ? 4096 : 0; }

uint64_t length_of_sums(const Description& description, const Layout& a) { return description.a_operation == 0 ? a.columns : a.rows; }

Matrix operand(const void* memory, const Layout& layout, int operation) {
    return {static_cast<unsigned char*>(const_cast<void*>(memory)), layout.type, layout.leading, operation != 0};
}

struct Operands {
    Matrix a, b, c, d;
};

// The workspace of an algorithm holds nothing afterwards.
void dirty(void* workspace, uint64_t bytes, void* stream) {
    if (bytes == 0 || configuration().idle) return;
    const Address first = reinterpret_cast<Address>(workspace);
    if (!is_allocated(first, bytes)) die("cublasLt: the workspace reaches outside its allocation");
    begin(stream), touch(stream, first);
    memset(workspace, 0xff, bytes);
}

uint64_t span(const Layout& layout) { return (static_cast<uint64_t>(layout.leading) * (layout.columns - 1) + layout.rows) * bytes_of(layout.type); }

// Matrices with one leading dimension may lie beside each other in the same columns of memory.
bool overlap(const void* x, const Layout& of_x, const void* y, const Layout& of_y) {
    const Address first = reinterpret_cast<Address>(x), second = reinterpret_cast<Address>(y);
    if (first >= second + span(of_y) || second >= first + span(of_x)) return false;
    if (of_x.leading != of_y.leading || of_x.type != of_y.type) return true;
    const int64_t distance = (static_cast<int64_t>(second) - static_cast<int64_t>(first)) / static_cast<int64_t>(bytes_of(of_x.type));
    const int64_t behind = (distance % of_x.leading + of_x.leading) % of_x.leading;
    return behind < static_cast<int64_t>(of_x.rows) || behind + static_cast<int64_t>(of_y.rows) > of_x.leading;
}

// The library's demands on matrices in 8 bits (its guide, "cublasLtMatmul()", regular narrow precision): a card of 8.9
// or later; sums along the columns in memory of both operands (transposed, not transposed); rows of whole 16 bytes in
// memory, and 16-byte addresses. Scales by row and column are of 9.0 alone.
bool takes_8_bits(const Description& of, const Layout* const (&layouts)[4], const uint32_t (&alignments)[4]) {
    const Layout &a = *layouts[0], &b = *layouts[1];
    if (a.type != e4m3 && b.type != e4m3) return of.a_scale_mode == scale_scalar && of.b_scale_mode == scale_scalar;
    const Configuration& card = configuration();
    if (card.capability_major * 10 + card.capability_minor < 89 || a.type != b.type) return false;
    if (of.a_operation != 1 || of.b_operation != 0) return false;
    for (int i = 0; i < 4; ++i)
        if (static_cast<uint64_t>(layouts[i]->leading) * bytes_of(layouts[i]->type) % 16 != 0 || alignments[i] % 16 != 0) return false;
    if (a.rows % 16 != 0 || a.columns % 16 != 0) return false;
    const bool outer = of.a_scale_mode == scale_outer_vector;
    if (of.a_scale_mode != of.b_scale_mode || (of.a_scale_mode != scale_scalar && !outer)) return false;
    if (outer != (of.a_scales != nullptr) || outer != (of.b_scales != nullptr)) return false;
    return !outer || (card.capability_major == 9 && card.capability_minor == 0);
}

}  // namespace

API cublasLtCreate(void** handle) {
    *handle = new int(0);
    return blas_success;
}
API cublasLtDestroy(void* handle) {
    delete static_cast<int*>(handle);
    return blas_success;
}
API cublasLtMatmulDescCreate(void** description, int compute, int scale) {
    *description = new Description{compute, scale};
    return blas_success;
}
API cublasLtMatmulDescDestroy(void* description) {
    delete static_cast<Description*>(description);
    return blas_success;
}
// The attributes have the numbers and sizes of cublasLtMatmulDescAttributes_t.
API cublasLtMatmulDescSetAttribute(void* description, int which, const void* value, size_t bytes) {
    Description& d = *static_cast<Description*>(description);
    void* place = nullptr;
    size_t expected = sizeof(int);
    switch (which) {
        case 3: place = &d.a_operation; break;
        case 4: place = &d.b_operation; break;
        case 17: place = &d.a_scales, expected = sizeof(void*); break;
        case 18: place = &d.b_scales, expected = sizeof(void*); break;
        case 25: place = &d.fast_sums, expected = 1; break;
        case 31: place = &d.a_scale_mode; break;
        case 32: place = &d.b_scale_mode; break;
        default: return blas_invalid_value;
    }
    if (bytes != expected) return blas_invalid_value;
    memcpy(place, value, bytes);
    return blas_success;
}
API cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    if (leading < static_cast<int64_t>(rows)) return blas_invalid_value;
    *layout = new Layout{type, rows, columns, leading};
    return blas_success;
}
API cublasLtMatrixLayoutDestroy(void* layout) {
    delete static_cast<Layout*>(layout);
    return blas_success;
}
API cublasLtMatmulPreferenceCreate(void** preference) {
    *preference = new Preference;
    return blas_success;
}
API cublasLtMatmulPreferenceDestroy(void* preference) {
    delete static_cast<Preference*>(preference);
    return blas_success;
}
API cublasLtMatmulPreferenceSetAttribute(void* preference, int which, const void* value, size_t bytes) {
    Preference& p = *static_cast<Preference*>(preference);
    if (which == 1 && bytes == 8) memcpy(&p.workspace_bytes, value, bytes);
    else if (which >= 5 && which <= 8 && bytes == 4) memcpy(&p.alignments[which - 5], value, bytes);
    else return blas_invalid_value;
    return blas_success;
}

API cublasLtMatmulAlgoGetHeuristic(void*, void* description, void* a, void* b, void* c, void* d, void* preference, int wanted, void* results, int* found) {
    const std::lock_guard<std::mutex> hold(lock);
    const Description& of = *static_cast<Description*>(description);
    const Preference& p = *static_cast<Preference*>(preference);
    const Layout* const layouts[4] = {static_cast<Layout*>(a), static_cast<Layout*>(b), static_cast<Layout*>(c), static_cast<Layout*>(d)};
    *found = 0;
    if (wanted < 1) return blas_invalid_value;
    if (!takes_8_bits(of, layouts, p.alignments)) return blas_not_supported;
    ++statistics.choices;
    Heuristic result = {};
    result.algorithm.shape = shape_of(of, {layouts[0], layouts[1], layouts[2], layouts[3]});
    result.workspace_bytes = std::min(wanted_workspace(*layouts[3], length_of_sums(of, *layouts[0])), p.workspace_bytes);
    result.algorithm.workspace_bytes = result.workspace_bytes;
    memcpy(result.algorithm.alignments, p.alignments, sizeof p.alignments);
    memcpy(results, &result, sizeof result);
    *found = 1;
    return blas_success;
}

API cublasLtMatmul(void*, void* description, const void* alpha, const void* a, void* a_layout, const void* b, void* b_layout, const void* beta,
                   const void* c, void* c_layout, void* d, void* d_layout, const void* algorithm, void* workspace, size_t workspace_bytes,
                   void* stream) {
    const std::lock_guard<std::mutex> hold(lock);
    const Description& of = *static_cast<Description*>(description);
    const Layout &left = *static_cast<Layout*>(a_layout), &right = *static_cast<Layout*>(b_layout), &from = *static_cast<Layout*>(c_layout),
                 &to = *static_cast<Layout*>(d_layout);
    Algorithm chosen;
    memcpy(&chosen, algorithm, sizeof chosen);
    if (chosen.shape != shape_of(of, {&left, &right, &from, &to})) die("cublasLt: an algorithm that was chosen for another shape");
    const void* const addresses[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i)
        if (reinterpret_cast<Address>(addresses[i]) % chosen.alignments[i] != 0)
            die("cublasLt: operand %c lies at %p, and %u bytes of alignment were promised", "ABCD"[i], addresses[i], chosen.alignments[i]);
    if (workspace_bytes < chosen.workspace_bytes) die("cublasLt: %zu bytes of workspace, %zu wanted", workspace_bytes, size_t{chosen.workspace_bytes});
    const uint64_t k = length_of_sums(of, left);
    if (k != (of.b_operation == 0 ? right.rows : right.columns)) return blas_invalid_value;
    if (overlap(d, to, a, left) || overlap(d, to, b, right)) die("cublasLt: the result overlaps an operand");
    if (c != d && overlap(d, to, c, from)) die("cublasLt: the result overlaps the matrix that is added, and is not it");
    const Operands operands = {operand(a, left, of.a_operation), operand(b, right, of.b_operation), operand(c, from, 0), operand(d, to, 0)};
    const int m = static_cast<int>(to.rows), n = static_cast<int>(to.columns), length = static_cast<int>(k), compute = of.compute;
    const Scalars scalars(alpha, beta, compute);
    const OuterScales scales = {of.a_scales, of.b_scales};
    const auto product = [=](void* s) {
        dirty(workspace, chosen.workspace_bytes, s);
        return multiply_matrices(s, m, n, length, scalars.alpha(), operands.a, 0, operands.b, 0, scalars.beta(), operands.c, operands.d, 0, 1,
                                 compute, scales);
    };
    return is_captured(stream) ? record(stream, product, NodeKind::kernel) : product(stream);
}
