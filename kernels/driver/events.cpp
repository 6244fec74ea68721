// Events hold the time at which they were recorded, because most work before them is done by then, and the moment of
// their stream.
#include <chrono>

#include "device.h"
#include "graphs.h"
#include "streams.h"
#include "transfers.h"

using namespace fake;

#define API EXPORT int

namespace {

struct Event {
    bool timed, recorded;
    std::chrono::steady_clock::time_point at;
    Mark mark;
    void* stream;
    uint64_t last_transfer;
};

const unsigned no_timing = 2;  // CU_EVENT_DISABLE_TIMING

}  // namespace

API cuEventCreate(void** event, unsigned flags) {
    const std::lock_guard<std::mutex> hold(lock);
    ++statistics.events;
    *event = new Event{(flags & no_timing) == 0, false, {}, {}, nullptr, 0};
    return success;
}
API cuEventDestroy_v2(void* event) {
    delete static_cast<Event*>(event);
    return success;
}
API cuEventRecord(void* event, void* stream) {
    const std::lock_guard<std::mutex> hold(lock);
    NOT_CAPTURED(stream);
    Event* e = static_cast<Event*>(event);
    e->recorded = true;
    e->at = std::chrono::steady_clock::now();
    e->mark = mark(stream);
    e->stream = stream;
    e->last_transfer = last_transfer();
    return success;
}
API cuEventRecordWithFlags(void* event, void* stream, unsigned) { return cuEventRecord(event, stream); }
API cuEventQuery(void* event) {
    const std::lock_guard<std::mutex> hold(lock);
    const Event* e = static_cast<Event*>(event);
    if (!is_done(e->mark)) return not_ready;
    finish_transfers_to_device(e->stream, e->last_transfer);
    return success;
}
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
    const std::lock_guard<std::mutex> hold(lock);
    NOT_CAPTURED(stream);
    wait_for(stream, static_cast<Event*>(event)->mark);
    return success;
}
API cuEventSynchronize(void* event) {
    const std::lock_guard<std::mutex> hold(lock);
    host_waits_for(static_cast<Event*>(event)->mark);
    ++statistics.host_synchronizations;
    finish_transfers();
    return success;
}
API cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    const Event *from = static_cast<Event*>(start), *to = static_cast<Event*>(end);
    if (!from->timed || !to->timed || !from->recorded || !to->recorded) return invalid_handle;
    *milliseconds = std::chrono::duration<float, std::milli>(to->at - from->at).count();
    return success;
}
API cuEventElapsedTime(float* milliseconds, void* start, void* end) { return cuEventElapsedTime_v2(milliseconds, start, end); }
