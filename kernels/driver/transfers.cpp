// Copies, and the detection of the two ways in which a program can forget to wait for one.
#include "transfers.h"

#include "streams.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace fake {
namespace {

struct Pinned {
    unsigned char* memory;
    size_t bytes;
};
std::vector<Pinned> pinned;

// A copy between the device and pinned memory that the host has not waited for.
struct Transfer {
    unsigned char* host;
    std::vector<unsigned char> bytes;
    bool arrives; // or leaves the host
    void* stream;
    uint64_t number;
};
std::vector<Transfer> transfers;
uint64_t transfers_queued;

// Pinned memory that a copy will arrive at which is still queued.
struct Expected {
    unsigned char* host;
    size_t bytes;
};
std::vector<Expected> expected;

bool meet(const unsigned char* x, size_t x_bytes, const unsigned char* y, size_t y_bytes) { return x < y + y_bytes && y < x + x_bytes; }

// The bytes that copies from pinned memory read: those the host sees, and those that arrived since it waited.
std::vector<unsigned char> as_copies_see(unsigned char* host, size_t bytes) {
    std::vector<unsigned char> seen(host, host + bytes);
    for (const Transfer& transfer : transfers) {
        if (!transfer.arrives || !meet(host, bytes, transfer.host, transfer.bytes.size())) continue;
        unsigned char *first = std::max(host, transfer.host), *end = std::min(host + bytes, transfer.host + transfer.bytes.size());
        std::copy(transfer.bytes.begin() + (first - transfer.host), transfer.bytes.begin() + (end - transfer.host), seen.begin() + (first - host));
    }
    return seen;
}

unsigned char* on_device(Address address) { return reinterpret_cast<unsigned char*>(address); }

Result forget_pinned(void* memory) {
    const auto found = std::find_if(pinned.begin(), pinned.end(), [&](const Pinned& p) { return p.memory == memory; });
    if (found == pinned.end()) return invalid_value;
    finish_transfers();
    pinned.erase(found);
    return success;
}

}  // namespace

bool is_pinned(const void* memory, size_t bytes) {
    const unsigned char* first = static_cast<const unsigned char*>(memory);
    return std::any_of(pinned.begin(), pinned.end(),
                       [&](const Pinned& p) { return first >= p.memory && first + bytes <= p.memory + p.bytes; });
}

Result copy_to_device(Address to, const void* from, size_t bytes, void* stream) {
    if (bytes == 0) return success;
    if (!is_allocated(to, bytes)) return invalid_value;
    ++statistics.host_to_device_copies;
    statistics.host_to_device_bytes += bytes;
    if (!is_pinned(from, bytes)) {
        memcpy(on_device(to), from, bytes);
        return success;
    }
    unsigned char* host = static_cast<unsigned char*>(const_cast<void*>(from));
    const auto send = [host, bytes, stream] {
        transfers.push_back({host, as_copies_see(host, bytes), false, stream, ++transfers_queued});
        return transfers.back().bytes;
    };
    // Bytes that have not arrived are read when the copy is done; others are read now and must not change.
    if (std::any_of(expected.begin(), expected.end(), [&](const Expected& e) { return meet(host, bytes, e.host, e.bytes); })) {
        queue(stream, to, bytes, [to, send] {
            const std::vector<unsigned char> sent = send();
            memcpy(on_device(to), sent.data(), sent.size());
        });
        return success;
    }
    const std::vector<unsigned char> sent = send();
    queue(stream, to, bytes, [to, sent] { memcpy(on_device(to), sent.data(), sent.size()); });
    return success;
}

Result copy_to_host(void* to, Address from, size_t bytes, void* stream) {
    if (bytes == 0) return success;
    if (!is_allocated(from, bytes)) return invalid_value;
    ++statistics.device_to_host_copies;
    statistics.device_to_host_bytes += bytes;
    if (configuration().trace) fprintf(stderr, "fake GPU: %zu bytes to the host\n", bytes);
    if (!is_pinned(to, bytes)) {
        memcpy(to, on_device(from), bytes);
        return success;
    }
    unsigned char* host = static_cast<unsigned char*>(to);
    queue_read(stream, from, bytes, [host, from, bytes, stream](bool torn) {
        std::vector<unsigned char> arrived(bytes, 0xff);
        if (!torn) memcpy(arrived.data(), on_device(from), bytes);
        transfers.push_back({host, std::move(arrived), true, stream, ++transfers_queued});
        const auto own = std::find_if(expected.begin(), expected.end(), [&](const Expected& e) { return e.host == host && e.bytes == bytes; });
        if (own != expected.end()) expected.erase(own);
    });
    expected.push_back({host, bytes});
    // Copies from this memory that the same stream has done before no longer need it.
    const auto is_over = [&](const Transfer& t) { return !t.arrives && t.stream == stream && meet(host, bytes, t.host, t.bytes.size()); };
    transfers.erase(std::remove_if(transfers.begin(), transfers.end(), is_over), transfers.end());
    memset(to, 0xff, bytes);
    return success;
}

Result copy_on_device(Address to, Address from, size_t bytes) {
    if (bytes == 0) return success;
    if (!is_allocated(to, bytes) || !is_allocated(from, bytes)) return invalid_value;
    ++statistics.device_to_device_copies;
    memmove(on_device(to), on_device(from), bytes);
    return success;
}

Result fill(Address to, const void* value, size_t value_bytes, size_t count) {
    if (count == 0) return success;
    if (!is_allocated(to, value_bytes * count)) return invalid_value;
    ++statistics.fills;
    for (size_t i = 0; i < count; ++i) memcpy(on_device(to) + i * value_bytes, value, value_bytes);
    return success;
}

Result allocate_pinned(void** memory, size_t bytes) {
    if (bytes == 0) return invalid_value;
    if (posix_memalign(memory, 4096, bytes) != 0) return out_of_memory;
    memset(*memory, 0xff, bytes);
    pinned.push_back({static_cast<unsigned char*>(*memory), bytes});
    return success;
}

Result release_pinned(void* memory) {
    const Result result = forget_pinned(memory);
    if (result == success) free(memory);
    return result;
}

Result register_pinned(void* memory, size_t bytes) {
    if (is_pinned(memory, 1)) return invalid_value;
    pinned.push_back({static_cast<unsigned char*>(memory), bytes});
    return success;
}

Result unregister_pinned(void* memory) { return forget_pinned(memory); }

static void check_unchanged(const Transfer& transfer) {
    if (memcmp(transfer.host, transfer.bytes.data(), transfer.bytes.size()) != 0)
        die("pinned memory was written while %zu bytes of it were on their way to the device", transfer.bytes.size());
}

void finish_transfers() {
    for (const Transfer& transfer : transfers) {
        if (transfer.arrives) memcpy(transfer.host, transfer.bytes.data(), transfer.bytes.size());
        else check_unchanged(transfer);
    }
    transfers.clear();
}

uint64_t last_transfer() { return transfers_queued; }

void finish_transfers_to_device(const void* stream, uint64_t last) {
    const auto is_done = [=](const Transfer& transfer) {
        if (transfer.arrives || transfer.stream != stream || transfer.number > last) return false;
        check_unchanged(transfer);
        return true;
    };
    transfers.erase(std::remove_if(transfers.begin(), transfers.end(), is_done), transfers.end());
}

}  // namespace fake
