// Products of matrices that are stored by columns, as both libraries of products compute them.
#pragma once
#include <cstring>

#include "device.h"

namespace fake {

// cublasStatus_t, cudaDataType_t and cublasComputeType_t, as far as they are used.
enum { blas_success = 0, blas_invalid_value = 7, blas_not_supported = 15 };
enum Type { f32 = 0, f64 = 1, bf16 = 14, e4m3 = 28 };
enum { compute_32f_first = 68, compute_64f = 70, compute_32f_last = 77 };

size_t bytes_of(int type);

struct Matrix {
    unsigned char* memory;
    int type;
    long long leading;  // elements from one column to the next
    bool transposed;

    // Element (row, column) of the operand, after transposition.
    size_t at(long long row, long long column) const {
        return static_cast<size_t>(transposed ? row * leading + column : column * leading + row);
    }
};

// A number for each row of a, and one for each column of b; null: there are none.
struct OuterScales {
    const float* rows = nullptr;
    const float* columns = nullptr;
};

// The two factors of a product, copied: f64 or f32, as it computes.
class Scalars {
  public:
    Scalars(const void* alpha, const void* beta, int compute) {
        memcpy(&first, alpha, compute == compute_64f ? 8 : 4);
        memcpy(&second, beta, compute == compute_64f ? 8 : 4);
    }
    const void* alpha() const { return &first; }
    const void* beta() const { return &second; }

  private:
    uint64_t first = 0, second = 0;
};

// d = alpha * a b + beta * c, `batch` times, with so many elements from one matrix to the next. c and d have the same
// stride. a b is scaled by row and column if there are scales. The caller holds the lock.
int multiply_matrices(void* stream, int m, int n, int k, const void* alpha, Matrix a, long long a_stride, Matrix b, long long b_stride,
                      const void* beta, Matrix c, Matrix d, long long c_stride, int batch, int compute, OuterScales scales = {});

}  // namespace fake
