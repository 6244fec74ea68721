// Stream capture and graphs.
//
// While a stream is captured, nothing runs: launches, products, fills, and copies become nodes with copies of their
// arguments. So do allocations and releases. Memory of a graph has a fixed address. It is 0xff again at its node of
// allocation, and at its release, in each launch; no other work may use it. Stricter than the driver: copies of memory
// that is not page-locked, events, and loading of modules are refused in a capture, and a capture must release what it
// allocates.
#include "graphs.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "streams.h"

using namespace fake;

#define API EXPORT int
#define LOCKED const std::lock_guard<std::mutex> hold(lock)

namespace {

struct Block {
    Address address;
    size_t bytes;
};

// The nodes of a graph, and its memory.
struct Recorded {
    std::vector<Node> nodes;
    std::vector<Block> blocks;
    uint64_t live_bytes = 0, peak_bytes = 0;
    // Set by the first launch or upload: its bytes are reserved.
    bool is_reserved = false;

    ~Recorded();
};

struct Capture {
    std::shared_ptr<Recorded> recorded = std::make_shared<Recorded>();
    std::set<Address> live;
    std::thread::id thread = std::this_thread::get_id();
    bool is_valid = true;
    NodeKind last = NodeKind::other;
};

struct Graph {
    std::shared_ptr<Recorded> recorded;
};

std::map<const void*, Capture>& captured() {
    static std::map<const void*, Capture> table;
    return table;
}

// The graph that a block of memory belongs to, and whether it is between its two nodes.
struct Owner {
    const Recorded* graph;
    bool is_live;
};
std::map<Address, Owner>& owners() {
    static std::map<Address, Owner> table;
    return table;
}

std::vector<const Recorded*> reserved;
const Recorded* running;

uint64_t most_reserved() {
    uint64_t most = 0;
    for (const Recorded* recorded : reserved) most = std::max(most, recorded->peak_bytes);
    return most;
}

Recorded::~Recorded() {
    for (const Block& block : blocks) {
        owners().erase(block.address);
        release_uncounted(block.address);
    }
    reserved.erase(std::remove(reserved.begin(), reserved.end(), this), reserved.end());
}

// A block of memory is poisoned at its allocation and at its release.
int poison(const Block& block, bool is_live) {
    owners()[block.address].is_live = is_live;
    if (!configuration().idle) memset(reinterpret_cast<void*>(block.address), 0xff, block.bytes);
    return success;
}

int reserve(Recorded& recorded) {
    if (recorded.is_reserved) return success;
    const uint64_t more = recorded.peak_bytes - std::min(recorded.peak_bytes, most_reserved());
    if (statistics.live_bytes + most_reserved() + more > configuration().memory_bytes) return out_of_memory;
    reserved.push_back(&recorded);
    recorded.is_reserved = true;
    statistics.graph_bytes = std::max(statistics.graph_bytes, most_reserved());
    return success;
}

// The host asked for one launch, so the work of its nodes is not counted as requests.
int run(Recorded& recorded, void* stream) {
    const Statistics before = statistics;
    running = &recorded;
    int answer = success;
    for (const Node& node : recorded.nodes) {
        answer = node(stream);
        if (answer != success) break;
    }
    running = nullptr;
    statistics.launches = before.launches;
    statistics.early_launches = before.early_launches;
    statistics.products = before.products;
    statistics.fills = before.fills;
    statistics.device_to_host_copies = before.device_to_host_copies;
    statistics.host_to_device_copies = before.host_to_device_copies;
    statistics.device_to_device_copies = before.device_to_device_copies;
    return answer;
}

}  // namespace

namespace fake {

bool is_captured(const void* stream) { return captured().count(stream) != 0; }

bool captures() {
    return std::any_of(captured().begin(), captured().end(), [](const auto& one) { return one.second.thread == std::this_thread::get_id(); });
}

int record(const void* stream, Node node, NodeKind kind) {
    Capture& capture = captured().at(stream);
    if (!capture.is_valid) return capture_invalidated;
    if (capture.thread != std::this_thread::get_id()) die("a thread asks something of a stream that another thread captures");
    capture.recorded->nodes.push_back(std::move(node));
    if (kind == NodeKind::early_kernel && capture.last != NodeKind::other) ++statistics.early_edges;
    capture.last = kind;
    return success;
}

int record_allocation(const void* stream, Address* address, size_t bytes) {
    Capture& capture = captured().at(stream);
    Recorded& recorded = *capture.recorded;
    if (!capture.is_valid) return capture_invalidated;
    const Result result = allocate_uncounted(address, bytes);
    if (result != success) return result;
    const Block block = {*address, bytes};
    recorded.blocks.push_back(block);
    recorded.live_bytes += bytes;
    recorded.peak_bytes = std::max(recorded.peak_bytes, recorded.live_bytes);
    capture.live.insert(*address);
    owners()[*address] = {&recorded, false};
    return record(stream, [block](void*) { return poison(block, true); });
}

int record_release(const void* stream, Address address) {
    Capture& capture = captured().at(stream);
    Recorded& recorded = *capture.recorded;
    if (!capture.is_valid) return capture_invalidated;
    // Memory that was allocated before the capture.
    if (capture.live.erase(address) == 0) return refuse(stream), invalid_value;
    const auto is_it = [address](const Block& block) { return block.address == address; };
    const Block block = *std::find_if(recorded.blocks.begin(), recorded.blocks.end(), is_it);
    recorded.live_bytes -= block.bytes;
    return record(stream, [block](void*) { return poison(block, false); });
}

int refuse(const void* stream) {
    captured().at(stream).is_valid = false;
    return capture_unsupported;
}

int refuse() {
    for (auto& [stream, capture] : captured())
        if (capture.thread == std::this_thread::get_id()) capture.is_valid = false;
    return capture_unsupported;
}

void check_use_of_graph_memory(Address first) {
    const auto found = owners().find(first);
    if (found == owners().end()) return;
    if (found->second.graph != running) die("memory of a graph is used outside of the graph's launches");
    if (!found->second.is_live) die("a graph uses memory that it has released or not yet allocated");
}

uint64_t graph_bytes() { return most_reserved(); }

}  // namespace fake

API cuStreamBeginCapture_v2(void* stream, int) {
    LOCKED;
    if (!configuration().graphs) return not_supported;
    if (stream == nullptr) return capture_unsupported;  // the legacy stream
    if (is_captured(stream)) return illegal_state;
    captured()[stream];
    return success;
}
API cuStreamEndCapture(void* stream, void** graph) {
    LOCKED;
    *graph = nullptr;
    const auto found = captured().find(stream);
    if (found == captured().end()) return illegal_state;
    const Capture capture = std::move(found->second);
    captured().erase(found);
    if (capture.thread != std::this_thread::get_id()) return capture_wrong_thread;
    if (!capture.is_valid) return capture_invalidated;
    if (!capture.live.empty()) die("a capture leaves %zu allocations that it does not release", capture.live.size());
    *graph = new Graph{capture.recorded};
    return success;
}
API cuStreamIsCapturing(void* stream, int* status) {
    LOCKED;
    const auto found = captured().find(stream);
    *status = found == captured().end() ? 0 : found->second.is_valid ? 1 : 2;
    return success;
}
API cuStreamGetCaptureInfo_v2(void* stream, int* status, uint64_t* number, void** graph, void* dependencies, size_t* count) {
    if (number != nullptr) *number = 1;
    if (graph != nullptr) *graph = nullptr;
    if (dependencies != nullptr) *static_cast<void**>(dependencies) = nullptr;
    if (count != nullptr) *count = 0;
    return cuStreamIsCapturing(stream, status);
}
API cuThreadExchangeStreamCaptureMode(int* mode) {
    static thread_local int now = 0;
    std::swap(*mode, now);
    return success;
}

API cuGraphInstantiateWithFlags(void** launched, void* graph, unsigned long long) {
    LOCKED;
    ++statistics.graphs;
    *launched = new Graph{static_cast<Graph*>(graph)->recorded};
    return success;
}
API cuGraphDestroy(void* graph) {
    LOCKED;
    delete static_cast<Graph*>(graph);
    return success;
}
API cuGraphExecDestroy(void* launched) {
    LOCKED;
    delete static_cast<Graph*>(launched);
    return success;
}
API cuGraphUpload(void* launched, void* stream) {
    LOCKED;
    NOT_CAPTURED(stream);
    return reserve(*static_cast<Graph*>(launched)->recorded);
}
API cuGraphLaunch(void* launched, void* stream) {
    LOCKED;
    NOT_CAPTURED(stream);
    Recorded& recorded = *static_cast<Graph*>(launched)->recorded;
    const int answer = reserve(recorded);
    if (answer != success) return answer;
    ++statistics.graph_launches;
    return run(recorded, stream);
}
API cuDeviceGetGraphMemAttribute(int, int which, void* value) {
    LOCKED;
    const uint64_t now = most_reserved(), most = statistics.graph_bytes;
    const uint64_t values[] = {now, most, now, most};  // in use, most in use, reserved, most reserved
    if (which < 0 || which > 3) return invalid_value;
    memcpy(value, &values[which], sizeof values[0]);
    return success;
}
API cuDeviceSetGraphMemAttribute(int, int which, void*) {
    LOCKED;
    if (which != 1 && which != 3) return invalid_value;
    statistics.graph_bytes = most_reserved();
    return success;
}
API cuDeviceGraphMemTrim(int) { return success; }
