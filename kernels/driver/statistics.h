/* What was asked of the fake device since it was loaded: read in the same process by
 *
 *     size_t hone_fake_gpu_stats(struct hone_fake_gpu_statistics* to, size_t bytes);
 *
 * found by dlsym(RTLD_DEFAULT, ...). It fills at most `bytes` bytes and returns how many it has: fields are only ever added at the end.
 *
 *     uint64_t hone_fake_gpu_launches(const char* kernel);      of one kernel
 */
#pragma once
#include <stdint.h>

struct hone_fake_gpu_statistics {
    uint64_t launches;
    uint64_t products; /* of cuBLAS and cublasLt */
    uint64_t allocations;
    uint64_t frees;
    uint64_t live_bytes;
    uint64_t peak_bytes;
    uint64_t host_synchronizations; /* of a stream, an event or the context: the host waits */
    uint64_t device_to_host_copies;
    uint64_t device_to_host_bytes;
    uint64_t host_to_device_copies;
    uint64_t host_to_device_bytes;
    uint64_t device_to_device_copies;
    uint64_t fills;  /* cuMemset */
    uint64_t events; /* created */
    uint64_t choices; /* of an algorithm of cublasLt */
    uint64_t graphs; /* instantiated */
    uint64_t graph_launches; /* what a graph does is not counted above, but for its bytes */
    uint64_t graph_bytes; /* most that graphs have reserved; not among live_bytes */
    uint64_t early_launches; /* of `launches`: kernels that may begin while the one before them ends */
    uint64_t early_edges; /* recorded in graphs: such kernels behind another kernel, with no other node between */
};
