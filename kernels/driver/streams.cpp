// The order of work between streams, as vector clocks: each stream knows how much of every other stream's work lies
// before its own.
#include "streams.h"

#include "graphs.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

namespace fake {

struct Late {
    Address memory;
    size_t bytes;
    bool writes, torn;
    std::function<void(bool torn)> work;
    std::shared_ptr<Pending> pending;
};

struct Stream {
    Moment before;  // its own entry counts its work
    std::deque<Late> late;
    uint64_t queued = 0, done = 0;
};

namespace {

std::vector<std::unique_ptr<Stream>>& streams() {
    static std::vector<std::unique_ptr<Stream>> all;
    return all;
}
// Work that the host has waited for lies before all work that it starts later.
Moment host;
// The last work of each stream that used an allocation.
std::map<Address, Moment> uses;

Stream& find(void* stream) {
    static Stream first;  // the stream without a handle
    return stream == nullptr ? first : *static_cast<Stream*>(stream);
}

void join(Moment& to, const Moment& from) {
    for (const auto& [stream, work] : from) to[stream] = std::max(to[stream], work);
}

// The lock is free while something is waited for, so that other threads of this process go on.
void finish(Stream& stream, uint64_t until, bool waits_for_threads = true) {
    while (stream.done < until && !stream.late.empty()) {
        const std::shared_ptr<Pending> pending = stream.late.front().pending;
        if (pending != nullptr && !pending->is_ready()) {
            if (pending->needs_threads && !waits_for_threads) return;
            lock.unlock();
            pending->wait();
            lock.lock();
            continue;
        }
        const Late late = stream.late.front();
        stream.late.pop_front();
        ++stream.done;
        late.work(late.torn);
    }
}

bool is_ordered(const Stream& stream, Address to) {
    const auto found = uses.find(allocation_of(to));
    if (found == uses.end()) return true;
    return std::all_of(found->second.begin(), found->second.end(), [&](const auto& use) {
        const auto known = stream.before.find(use.first);
        return use.first == &stream || (known != stream.before.end() && known->second >= use.second);
    });
}

}  // namespace

bool Pending::is_ready() {
    const std::lock_guard<std::mutex> hold(mutex);
    return ready;
}

void Pending::wait() {
    std::unique_lock<std::mutex> hold(mutex);
    changed.wait(hold, [this] { return ready; });
}

void Pending::end() {
    const std::lock_guard<std::mutex> hold(mutex);
    ready = true;
    changed.notify_all();
}

void* create_stream() {
    streams().push_back(std::make_unique<Stream>());
    streams().back()->before = host;
    return streams().back().get();
}

// Its moments stay in other streams' clocks, so the stream itself stays too.
void destroy_stream(void* stream) {
    if (stream != nullptr) finish(find(stream), UINT64_MAX);
}

void begin(void* handle) {
    Stream& stream = find(handle);
    finish(stream, UINT64_MAX);
    join(stream.before, host);
    ++stream.before[&stream];
}

void touch(void* handle, Address address) {
    const Address first = allocation_of(address);
    Stream& stream = find(handle);
    check_use_of_graph_memory(first);
    if (first != 0) uses[first][&stream] = stream.before[&stream];
}

void queue(void* handle, Address to, size_t bytes, std::function<void()> work, std::shared_ptr<Pending> pending) {
    Stream& stream = find(handle);
    join(stream.before, host);
    const bool torn = !is_ordered(stream, to);
    ++stream.before[&stream];
    touch(handle, to);
    memset(reinterpret_cast<void*>(to), 0xff, bytes);
    const auto written = [to, bytes, work](bool is_torn) {
        work();
        if (is_torn) memset(reinterpret_cast<void*>(to), 0xff, bytes);
    };
    stream.late.push_back({to, bytes, true, torn, written, std::move(pending)});
    ++stream.queued;
}

void queue_read(void* handle, Address from, size_t bytes, std::function<void(bool torn)> work) {
    Stream& stream = find(handle);
    finish(stream, UINT64_MAX);
    join(stream.before, host);
    const bool torn = !is_ordered(stream, from);
    ++stream.before[&stream];
    touch(handle, from);
    stream.late.push_back({from, bytes, false, torn, std::move(work), nullptr});
    ++stream.queued;
}

void check_free(void* handle, Address address) {
    const Address first = allocation_of(address);
    Stream& stream = find(handle);
    const auto is_late = [&](const Late& late) { return !late.writes && allocation_of(late.memory) == first; };
    const auto waits = [&](const Stream& other) { return std::any_of(other.late.begin(), other.late.end(), is_late); };
    // A read that is still queued reads nothing then, which the program's results show.
    if (waits(find(nullptr)) || std::any_of(streams().begin(), streams().end(), [&](const auto& other) { return waits(*other); })) return;
    if (first != 0 && !is_ordered(stream, first)) die("memory is freed in a stream that does not wait for its use in another one");
}

Mark mark(void* handle) {
    Stream& stream = find(handle);
    return {&stream, stream.before, stream.queued};
}

bool is_done(const Mark& mark) {
    if (mark.stream == nullptr) return true;
    uint64_t number = mark.stream->done;
    for (const Late& late : mark.stream->late) {
        if (++number > mark.queued) return true;
        if (late.pending != nullptr && !late.pending->is_ready()) return false;
    }
    return true;
}

void wait_for(void* handle, const Mark& mark) {
    if (mark.stream == nullptr) return;
    Stream& stream = find(handle);
    if (&stream != mark.stream) finish(*mark.stream, mark.queued);
    join(stream.before, mark.before);
}

void host_waits_for(const Mark& mark) {
    if (mark.stream == nullptr) return;
    finish(*mark.stream, mark.queued);
    join(host, mark.before);
}

void host_waits_for_all() {
    host_waits_for(mark(nullptr));
    // Another thread may create a stream meanwhile.
    for (size_t i = 0; i < streams().size(); ++i) {
        const Mark all = mark(streams()[i].get());
        finish(*all.stream, all.queued, false);
        join(host, all.before);
    }
}

void forget(Address first, uint64_t bytes) {
    uses.erase(first);
    const auto check = [&](Stream& stream) {
        for (Late& late : stream.late) {
            if (late.memory < first || late.memory >= first + bytes) continue;
            if (late.writes) die("memory was freed while %zu bytes were on their way to it", late.bytes);
            late.torn = true;
        }
    };
    check(find(nullptr));
    for (const std::unique_ptr<Stream>& stream : streams()) check(*stream);
}

}  // namespace fake
