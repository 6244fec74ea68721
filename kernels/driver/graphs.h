// Graphs: the work that a stream was given while it was captured. Each launch of the graph does this work.
#pragma once
#include <functional>

#include "device.h"

namespace fake {

// One node: work on the stream that launches the graph, and the driver's answer.
typedef std::function<int(void* stream)> Node;

// Whether a stream is being captured, and whether this thread captures one.
bool is_captured(const void* stream);
bool captures();

// The kind of a node, which decides the kind of the edge to the next one.
enum class NodeKind { other, kernel, early_kernel };

// The answer to a call on a captured stream that becomes a node. An edge lets a kernel begin early if both of its nodes
// are kernels (CUDA Driver API, "CUgraphDependencyType"): memory that is allocated or freed between two kernels keeps
// them apart.
int record(const void* stream, Node node, NodeKind kind = NodeKind::other);
// The same for memory. Its address is fixed, and it can be used between these two nodes alone.
int record_allocation(const void* stream, Address* address, size_t bytes);
int record_release(const void* stream, Address address);
// The answer to a call that a capture does not allow. It ends the capture as invalid.
int refuse(const void* stream);
// The same for a call that names no stream.
int refuse();

// Ends the process if an allocation is memory of a graph and something else uses it, or the graph when it has freed it.
void check_use_of_graph_memory(Address first);

// Bytes that graphs have reserved. Graphs do not run side by side, so they share them.
uint64_t graph_bytes();

}  // namespace fake

// A captured stream records the call; the work may use `s`, the stream that launches the graph.
#define RECORDED_AS(kind, stream, work) \
    if (is_captured(stream)) return record(stream, [=](void* s) -> int { return work; }, kind)
#define RECORDED(stream, work) RECORDED_AS(NodeKind::other, stream, work)
// A captured stream, or a thread that captures one, may not make this call.
#define NOT_CAPTURED(stream) \
    if (is_captured(stream)) return refuse(stream)
#define NOT_IN_CAPTURE \
    if (captures()) return refuse()
