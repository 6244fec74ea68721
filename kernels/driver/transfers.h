// Copies between host memory and device memory. Copies of pinned host memory are complete only when the host has
// waited.
#pragma once
#include "device.h"

namespace fake {

// A copy from pinned memory is queued in its stream.
Result copy_to_device(Address to, const void* from, size_t bytes, void* stream);
// A copy to pinned memory, too. The host sees it when it has waited; copies from there see it in the order of the
// streams.
Result copy_to_host(void* to, Address from, size_t bytes, void* stream);
Result copy_on_device(Address to, Address from, size_t bytes);
bool is_pinned(const void* memory, size_t bytes);
Result fill(Address to, const void* value, size_t value_bytes, size_t count);

Result allocate_pinned(void** memory, size_t bytes);
Result release_pinned(void* memory);
Result register_pinned(void* memory, size_t bytes);
Result unregister_pinned(void* memory);

// Called when the host has waited: pending arrivals are written, and sources that had to stay unchanged are
// compared.
void finish_transfers();

// The number of the last copy that began. The host has found by an event that a stream's copies to the device up to
// that number are done: their sources may change from now on.
uint64_t last_transfer();
void finish_transfers_to_device(const void* stream, uint64_t last);

}  // namespace fake
