// libcublas: products of matrices stored by columns (cublasLt's are in blas_lt.cpp), in f32, f64 or bf16, with sums in
// f64 that are rounded once.
//
// It checks what the library requires and cannot check itself: shapes and strides, and that every matrix lies
// inside one allocation.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "../emulator/bfloat16.h"
#include "blas.h"
#include "graphs.h"
#include "streams.h"

using namespace fake;

#define API EXPORT int

namespace {

// Sign, four bits of exponent, three of fraction; the largest pattern is NaN.
double number_of_e4m3(unsigned char bits) {
    const int exponent = bits >> 3 & 15, fraction = bits & 7;
    if (exponent == 15 && fraction == 7) return NAN;
    const double size = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
    return bits & 0x80 ? -size : size;
}

double load(const void* memory, int type, size_t at) {
    switch (type) {
        case e4m3: return number_of_e4m3(static_cast<const unsigned char*>(memory)[at]);
        case f64: return static_cast<const double*>(memory)[at];
        case f32: return static_cast<const float*>(memory)[at];
        default: return float(static_cast<const __nv_bfloat16*>(memory)[at]);
    }
}

void store(void* memory, int type, size_t at, double value) {
    switch (type) {
        case f64: static_cast<double*>(memory)[at] = value; break;
        case f32: static_cast<float*>(memory)[at] = static_cast<float>(value); break;
        default: static_cast<__nv_bfloat16*>(memory)[at] = __nv_bfloat16(static_cast<float>(value));
    }
}

// The operand's stored rows must fit its leading dimension.
bool is_shaped(const Matrix& matrix, int rows, int columns) {
    return matrix.leading >= std::max(1, matrix.transposed ? columns : rows);
}

void check_inside(const char* name, const Matrix& matrix, int rows, int columns) {
    if (rows == 0 || columns == 0) return;
    if (matrix.transposed) std::swap(rows, columns);
    const uint64_t elements = static_cast<uint64_t>(matrix.leading) * (columns - 1) + rows;
    if (!is_allocated(reinterpret_cast<Address>(matrix.memory), elements * bytes_of(matrix.type)))
        die("cuBLAS: %s, %d x %d with leading dimension %lld, reaches outside its allocation", name, rows, columns, matrix.leading);
}

struct Product {
    int m, n, k;
    double alpha, beta;
    Matrix a, b, c, d;
    OuterScales scales;
};

// Computes rows [from, to) of d. The innermost loop runs along a row of b: its sums are independent, so any vector
// width adds in the same order.
__attribute__((target_clones("default", "avx2", "avx512f"))) void multiply_rows(const Product& p, const std::vector<double>& b, int from, int to) {
    std::vector<double> sums(static_cast<size_t>(p.n));
    for (int i = from; i < to; ++i) {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int l = 0; l < p.k && p.alpha != 0; ++l) {
            const double factor = load(p.a.memory, p.a.type, p.a.at(i, l));
            const double* row = b.data() + static_cast<size_t>(l) * p.n;
            double* sum = sums.data();
            for (int j = 0; j < p.n; ++j) sum[j] += factor * row[j];
        }
        for (int j = 0; j < p.n; ++j) {
            const size_t at = p.c.at(i, j);
            // If beta is 0, c is not read, so it may hold NaN.
            const double kept = p.beta == 0 ? 0.0 : p.beta * load(p.c.memory, p.c.type, at);
            const double scale = p.scales.rows == nullptr ? 1.0 : double(p.scales.rows[i]) * p.scales.columns[j];
            store(p.d.memory, p.d.type, p.d.at(i, j), p.alpha * scale * sums[static_cast<size_t>(j)] + kept);
        }
    }
}

void multiply(const Product& p) {
    std::vector<double> b(static_cast<size_t>(p.k) * p.n);
    for (int l = 0; l < p.k; ++l) {
        for (int j = 0; j < p.n; ++j) b[static_cast<size_t>(l) * p.n + j] = load(p.b.memory, p.b.type, p.b.at(l, j));
    }
    // Starting a thread takes some 30 us, so threads are used only for products of more than a few million terms.
    const double terms = double(p.m) * p.n * p.k;
    const int threads = terms < 4e6 ? 1 : std::min<int>(static_cast<int>(configuration().host_threads), p.m);
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) {
        helpers.emplace_back([&, i] {
            multiply_rows(p, b, static_cast<int>(int64_t{p.m} * i / threads), static_cast<int>(int64_t{p.m} * (i + 1) / threads));
        });
    }
    multiply_rows(p, b, 0, p.m / threads);
    for (std::thread& helper : helpers) helper.join();
}

bool is_supported(int a, int b, int c, int compute) {
    if (compute == compute_64f) return a == f64 && b == f64 && c == f64;
    if (compute < compute_32f_first || compute > compute_32f_last || a != b) return false;
    return a == f32 ? c == f32 : (a == bf16 || a == e4m3) && (c == bf16 || c == f32);
}

// A handle is the stream of its products.
struct Handle {
    void* stream = nullptr;
};

int multiply_batch(void* handle, int m, int n, int k, const void* alpha, Matrix a, long long a_stride, Matrix b, long long b_stride, const void* beta,
                   Matrix c, long long c_stride, int batch, int compute) {
    const std::lock_guard<std::mutex> hold(lock);
    void* stream = static_cast<Handle*>(handle)->stream;
    const Scalars scalars(alpha, beta, compute);
    RECORDED_AS(NodeKind::kernel, stream, multiply_matrices(s, m, n, k, scalars.alpha(), a, a_stride, b, b_stride, scalars.beta(), c, c, c_stride, batch, compute));
    return multiply_matrices(stream, m, n, k, alpha, a, a_stride, b, b_stride, beta, c, c, c_stride, batch, compute);
}

Matrix operand(const void* memory, int type, int leading, int operation) {
    return {static_cast<unsigned char*>(const_cast<void*>(memory)), type, leading, operation != 0};
}

}  // namespace

namespace fake {

size_t bytes_of(int type) { return type == f64 ? 8 : type == f32 ? 4 : type == bf16 ? 2 : 1; }

int multiply_matrices(void* stream, int m, int n, int k, const void* alpha, Matrix a, long long a_stride, Matrix b, long long b_stride,
                      const void* beta, Matrix c, Matrix d, long long c_stride, int batch, int compute, OuterScales scales) {
    if (m < 0 || n < 0 || k < 0 || batch < 0) return blas_invalid_value;
    if (!is_shaped(a, m, k) || !is_shaped(b, k, n) || !is_shaped(c, m, n) || !is_shaped(d, m, n)) return blas_invalid_value;
    if (!is_supported(a.type, b.type, c.type, compute) || d.type != c.type) return blas_not_supported;
    ++statistics.products;
    if (configuration().idle) return blas_success;
    begin(stream);
    for (const Matrix& matrix : {a, b, c, d}) touch(stream, reinterpret_cast<Address>(matrix.memory));
    if (scales.rows != nullptr) {
        const std::pair<const float*, int> vectors[] = {{scales.rows, m}, {scales.columns, n}};
        for (const auto& [vector, length] : vectors) {
            if (!is_allocated(reinterpret_cast<Address>(vector), sizeof(float) * static_cast<uint64_t>(length)))
                die("cublasLt: %d scales reach outside their allocation", length);
            touch(stream, reinterpret_cast<Address>(vector));
        }
    }
    if (configuration().trace) fprintf(stderr, "fake GPU: product %d x %d x %d, %d times\n", m, n, k, batch);
    const auto scalar = [&](const void* value) { return load(value, compute == compute_64f ? f64 : f32, 0); };
    for (int i = 0; i < batch && m > 0 && n > 0; ++i) {
        const auto item = [&](Matrix matrix, long long stride) {
            matrix.memory += i * stride * static_cast<long long>(bytes_of(matrix.type));
            return matrix;
        };
        const Product p = {m, n, k, scalar(alpha), scalar(beta), item(a, a_stride), item(b, b_stride), item(c, c_stride), item(d, c_stride), scales};
        if (p.alpha != 0) {
            check_inside("A", p.a, m, k);
            check_inside("B", p.b, k, n);
        }
        if (p.beta != 0) check_inside("C", p.c, m, n);
        check_inside("D", p.d, m, n);
        multiply(p);
    }
    return blas_success;
}

}  // namespace fake

API cublasCreate_v2(void** handle) {
    *handle = new Handle;
    return blas_success;
}
API cublasDestroy_v2(void* handle) {
    delete static_cast<Handle*>(handle);
    return blas_success;
}
API cublasSetStream_v2(void* handle, void* stream) {
    static_cast<Handle*>(handle)->stream = stream;
    return blas_success;
}
API cublasSetWorkspace_v2(void*, void*, size_t) { return blas_success; }
API cublasSetMathMode(void*, int) { return blas_success; }
API cublasGetVersion_v2(void*, int* version) {
    *version = 130100;
    return blas_success;
}

API cublasGemmStridedBatchedEx(void* handle, int a_operation, int b_operation, int m, int n, int k, const void* alpha, const void* a, int a_type,
                               int a_leading, long long a_stride, const void* b, int b_type, int b_leading, long long b_stride,
                               const void* beta, void* c, int c_type, int c_leading, long long c_stride, int batch, int compute, int) {
    return multiply_batch(handle, m, n, k, alpha, operand(a, a_type, a_leading, a_operation), a_stride,
                          operand(b, b_type, b_leading, b_operation), b_stride, beta, operand(c, c_type, c_leading, 0), c_stride, batch,
                          compute);
}
API cublasGemmEx(void* handle, int a_operation, int b_operation, int m, int n, int k, const void* alpha, const void* a, int a_type, int a_leading,
                 const void* b, int b_type, int b_leading, const void* beta, void* c, int c_type, int c_leading, int compute, int) {
    return multiply_batch(handle, m, n, k, alpha, operand(a, a_type, a_leading, a_operation), 0, operand(b, b_type, b_leading, b_operation), 0,
                          beta, operand(c, c_type, c_leading, 0), 0, 1, compute);
}
API cublasSgemm_v2(void* handle, int a_operation, int b_operation, int m, int n, int k, const float* alpha, const float* a, int a_leading,
                   const float* b, int b_leading, const float* beta, float* c, int c_leading) {
    return multiply_batch(handle, m, n, k, alpha, operand(a, f32, a_leading, a_operation), 0, operand(b, f32, b_leading, b_operation), 0, beta,
                          operand(c, f32, c_leading, 0), 0, 1, compute_32f_first);
}
API cublasDgemmStridedBatched(void* handle, int a_operation, int b_operation, int m, int n, int k, const double* alpha, const double* a,
                              int a_leading, long long a_stride, const double* b, int b_leading, long long b_stride, const double* beta,
                              double* c, int c_leading, long long c_stride, int batch) {
    return multiply_batch(handle, m, n, k, alpha, operand(a, f64, a_leading, a_operation), a_stride, operand(b, f64, b_leading, b_operation),
                          b_stride, beta, operand(c, f64, c_leading, 0), c_stride, batch, compute_64f);
}
