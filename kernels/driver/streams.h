// Streams of work: the order between them that events give, and copies that arrive late.
#pragma once
#include <condition_variable>
#include <functional>
#include <memory>

#include "device.h"

namespace fake {

struct Stream;

// A moment in the order of all streams: for each stream, how much of its work lies before.
typedef std::map<const Stream*, uint64_t> Moment;

// The moment that an event recorded.
struct Mark {
    Stream* stream = nullptr;
    Moment before;
    uint64_t queued = 0;
};

// Work of a stream that waits for another thread: the other ranks' part of a collective.
struct Pending {
    // The other thread needs this process's own threads to go on, since some of the ranks are among them.
    bool needs_threads = false;
    bool is_ready();
    void wait();
    void end();

private:
    bool ready = false;
    std::mutex mutex;
    std::condition_variable changed;
};

void* create_stream();
void destroy_stream(void* stream);

// Begins work of a stream that is done at once. It first finishes all work that the stream has queued.
void begin(void* stream);
// The work that has begun reads or writes the allocation of this address, if it is one.
void touch(void* stream, Address address);
// Queues work that writes to [to, to + bytes). It is done as late as the program allows: when a stream or the host
// waits for it, or when its own stream does something else. Until then the memory holds 0xff. If another stream has
// used the memory and nothing orders that use before this work, the work leaves 0xff.
void queue(void* stream, Address to, size_t bytes, std::function<void()> work, std::shared_ptr<Pending> pending = nullptr);
// Queues work that reads [from, from + bytes); it is done as late as a write. `torn` is true if the read came too early
// or too late: another stream has used the memory and nothing orders that use before this work, or the memory was freed
// before it.
void queue_read(void* stream, Address from, size_t bytes, std::function<void(bool torn)> work);
// The memory of an allocation is about to be freed by a stream, which must know of all uses of it.
void check_free(void* stream, Address address);

Mark mark(void* stream);
// Whether the work before the mark is done, or would be if something waited for it.
bool is_done(const Mark& mark);
void wait_for(void* stream, const Mark& mark);
void host_waits_for(const Mark& mark);
void host_waits_for_all();

// The allocation is freed. Queued work does not write to it any more, and queued reads of it read nothing.
void forget(Address first, uint64_t bytes);

}  // namespace fake
