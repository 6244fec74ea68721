// Host memory in, device memory out, and back; pinned host memory, whose copies are over only when the host has waited.
#pragma once
#include "device.h"

namespace fake {

Result copy_to_device(Address to, const void* from, size_t bytes);
Result copy_to_host(void* to, Address from, size_t bytes);
Result copy_on_device(Address to, Address from, size_t bytes);
Result fill(Address to, const void* value, size_t value_bytes, size_t count);

Result allocate_pinned(void** memory, size_t bytes);
Result release_pinned(void* memory);
Result register_pinned(void* memory, size_t bytes);
Result unregister_pinned(void* memory);

// The host has waited: what was to arrive does, what was to stay is compared.
void finish_transfers();

}  // namespace fake
