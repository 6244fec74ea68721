// libnccl: collectives between processes of one machine, through shared memory.
//
// A communicator is a file of /dev/shm that its unique id names, and one more for each rank's data. A collective copies
// this rank's values out, waits for all ranks, and combines them in the order of the ranks; sums are taken in f64. It is
// done when the call returns. Ranks that make different calls end with both calls named. A rank whose process is gone
// is ncclRemoteError for the others. The environment sets:
//   HONE_FAKE_NCCL_DIE       RANK:CALL, the rank's process is killed at this collective, counted from 1
//   HONE_FAKE_NCCL_HANG      RANK:CALL, the rank never comes to this collective
//   HONE_FAKE_NCCL_DELAY     milliseconds that a rank waits before each collective, times a number of 0 to 3 that differs
//   HONE_FAKE_NCCL_LOG       a file: a line for each collective, as `RANK CALL WHAT COUNT TYPE`
//   HONE_FAKE_NCCL_PATIENCE  seconds that a rank waits for the others (60)
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <string>
#include <vector>

#include "driver/device.h"

#define API EXPORT int

namespace {

// The values of ncclResult_t that are returned.
enum { ok = 0, system_error = 2, invalid_argument = 4, invalid_usage = 5, remote_error = 6 };
// The values of ncclDataType_t that hone uses.
enum { uint8 = 1, float32 = 7 };
constexpr int ranks_max = 64, version = 22700;

struct Id {
    char text[128];
};

struct Config {
    size_t size;
    unsigned magic, version;
};

// What a rank does at the moment. A field is written before the rank arrives, and read after all did.
struct Seat {
    std::atomic<int> process;
    char what[16];
    uint64_t count;
    int type;
};

struct Shared {
    std::atomic<int> arrived, aborted;
    std::atomic<uint64_t> round;
    Seat seats[ranks_max];
};

struct Communicator {
    std::string name;
    int rank, world, error = ok;
    uint64_t calls = 0;
    Shared* shared;
};

uint64_t number(const char* variable, uint64_t otherwise) {
    const char* text = getenv(variable);
    return text == nullptr ? otherwise : strtoull(text, nullptr, 10);
}

void sleep_milliseconds(uint64_t milliseconds) {
    const timespec pause = {(time_t)(milliseconds / 1000), (long)(milliseconds % 1000) * 1000000};
    nanosleep(&pause, nullptr);
}

// Whether a variable RANK:CALL names this call of this rank.
bool is_named(const char* variable, const Communicator& comm) {
    int rank = -1;
    unsigned long long call = 0;
    const char* text = getenv(variable);
    return text != nullptr && sscanf(text, "%d:%llu", &rank, &call) == 2 && rank == comm.rank && call == comm.calls;
}

void* mapped(const std::string& name, size_t bytes, bool grow) {
    const int file = open(("/dev/shm/" + name).c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0) return nullptr;
    void* memory = MAP_FAILED;
    if (!grow || ftruncate(file, (off_t)bytes) == 0) memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return memory == MAP_FAILED ? nullptr : memory;
}

std::string data_of(const Communicator& comm, int rank) { return comm.name + "-" + std::to_string(rank); }

// Waits until every rank is here.
int meet(Communicator& comm) {
    Shared& shared = *comm.shared;
    const uint64_t round = shared.round.load();
    if (shared.arrived.fetch_add(1) + 1 == comm.world) {
        shared.arrived.store(0);
        shared.round.fetch_add(1);
        return ok;
    }
    const uint64_t patience = 20000 * number("HONE_FAKE_NCCL_PATIENCE", 60);
    for (uint64_t looks = 0; shared.round.load() == round; ++looks) {
        if (shared.aborted.load() != 0) return remote_error;
        for (int rank = 0; looks % 200 == 199 && rank < comm.world; ++rank) {
            const int process = shared.seats[rank].process.load();
            // A rank that left after it came is not missed.
            if (process != 0 && kill(process, 0) != 0 && errno == ESRCH && shared.round.load() == round) return remote_error;
        }
        if (looks > patience) return remote_error;
        usleep(50);
    }
    return ok;
}

void tell(const Communicator& comm, const char* what, uint64_t count, int type) {
    const char* file = getenv("HONE_FAKE_NCCL_LOG");
    if (file == nullptr) return;
    const int to = open(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    dprintf(to, "%d %llu %s %llu %d\n", comm.rank, (unsigned long long)comm.calls, what, (unsigned long long)count, type);
    close(to);
}

// Ends the process if the ranks do not make the same call.
void compare(const Communicator& comm) {
    const Seat& own = comm.shared->seats[comm.rank];
    for (int rank = 0; rank < comm.world; ++rank) {
        const Seat& other = comm.shared->seats[rank];
        if (strcmp(own.what, other.what) == 0 && own.count == other.count && own.type == other.type) continue;
        fake::die("nccl: at call %llu rank %d calls %s of %llu values of type %d, and rank %d calls %s of %llu values of type %d",
                  (unsigned long long)comm.calls, comm.rank, own.what, (unsigned long long)own.count, own.type, rank, other.what,
                  (unsigned long long)other.count, other.type);
    }
}

// Gives this rank's bytes, and has `use` read those of each rank in order.
template <typename Use>
int collective(Communicator* comm, const char* what, const void* from, uint64_t count, int type, size_t bytes, Use use) {
    if (comm == nullptr) return invalid_argument;
    if (comm->error != ok) return comm->error;
    ++comm->calls;
    tell(*comm, what, count, type);
    if (is_named("HONE_FAKE_NCCL_DIE", *comm)) kill(getpid(), SIGKILL);
    while (is_named("HONE_FAKE_NCCL_HANG", *comm)) sleep_milliseconds(1000);
    sleep_milliseconds(number("HONE_FAKE_NCCL_DELAY", 0) * ((comm->calls * 7 + comm->rank * 5) % 4));
    Seat& seat = comm->shared->seats[comm->rank];
    snprintf(seat.what, sizeof seat.what, "%s", what);
    seat.count = count;
    seat.type = type;
    void* own = mapped(data_of(*comm, comm->rank), bytes + 1, true);
    if (own == nullptr) return comm->error = system_error;
    memcpy(own, from, bytes);
    munmap(own, bytes + 1);
    comm->error = meet(*comm);
    if (comm->error != ok) return comm->error;
    compare(*comm);
    for (int rank = 0; rank < comm->world; ++rank) {
        void* data = mapped(data_of(*comm, rank), bytes + 1, false);
        if (data == nullptr) return comm->error = system_error;
        use(rank, data);
        munmap(data, bytes + 1);
    }
    // No rank writes its next values before all have read these.
    return comm->error = meet(*comm);
}

bool is_allocated(const void* address, size_t bytes) {
    std::lock_guard<std::mutex> guard(fake::lock);
    return fake::is_allocated((fake::Address)address, bytes);
}

int leave(Communicator* comm, bool abort) {
    if (comm == nullptr) return invalid_argument;
    if (abort) comm->shared->aborted.store(1);
    comm->shared->seats[comm->rank].process.store(0);
    unlink(("/dev/shm/" + data_of(*comm, comm->rank)).c_str());
    if (comm->rank == 0) unlink(("/dev/shm/" + comm->name).c_str());
    munmap(comm->shared, sizeof(Shared));
    delete comm;
    return ok;
}

}  // namespace

API ncclGetVersion(int* to) {
    *to = version;
    return ok;
}

API ncclGetUniqueId(Id* to) {
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    memset(to, 0, sizeof *to);
    snprintf(to->text, sizeof to->text, "hone-fake-nccl-%d-%lld-%ld", getpid(), (long long)now.tv_sec, now.tv_nsec);
    return ok;
}

API ncclCommInitRankConfig(void** to, int world, Id id, int rank, Config* config) {
    if (world < 1 || world > ranks_max || rank < 0 || rank >= world) return invalid_argument;
    if (config != nullptr && (config->magic != 0xcafebeefu || config->size < sizeof(Config))) return invalid_argument;
    id.text[sizeof id.text - 1] = 0;
    if (strncmp(id.text, "hone-fake-nccl-", 15) != 0 || strchr(id.text, '/') != nullptr) return invalid_argument;
    Communicator* comm = new Communicator;
    comm->name = id.text;
    comm->rank = rank;
    comm->world = world;
    // A file that grows is filled with zeros, which is the state before the first call.
    comm->shared = (Shared*)mapped(comm->name, sizeof(Shared), true);
    if (comm->shared == nullptr) {
        delete comm;
        return system_error;
    }
    comm->shared->seats[rank].process.store(getpid());
    comm->error = meet(*comm);
    *to = comm;
    return comm->error;
}

API ncclCommGetAsyncError(Communicator* comm, int* to) {
    if (comm == nullptr) return invalid_argument;
    *to = comm->error;
    return ok;
}

API ncclCommAbort(Communicator* comm) { return leave(comm, true); }
API ncclCommDestroy(Communicator* comm) { return leave(comm, false); }

API ncclAllReduce(const void* from, void* to, size_t count, int type, int operation, Communicator* comm, void*) {
    const size_t bytes = 4 * count;
    if (type != float32 || operation != 0) return invalid_usage;
    if (!is_allocated(from, bytes) || !is_allocated(to, bytes)) return invalid_argument;
    // Adding to -0 changes no bit of a value.
    std::vector<double> sums(count, -0.);
    const int result = collective(comm, "AllReduce", from, count, type, bytes, [&](int, const void* data) {
        for (size_t i = 0; i < count; ++i) sums[i] += (double)((const float*)data)[i];
    });
    for (size_t i = 0; result == ok && i < count; ++i) ((float*)to)[i] = (float)sums[i];
    return result;
}

API ncclAllGather(const void* from, void* to, size_t count, int type, Communicator* comm, void*) {
    if (comm == nullptr) return invalid_argument;
    if (type != uint8) return invalid_usage;
    if (!is_allocated(from, count) || !is_allocated(to, count * comm->world)) return invalid_argument;
    return collective(comm, "AllGather", from, count, type, count,
                      [&](int rank, const void* data) { memcpy((char*)to + (size_t)rank * count, data, count); });
}

EXPORT const char* ncclGetErrorString(int error) {
    switch (error) {
        case ok: return "no error";
        case system_error: return "unhandled system error";
        case invalid_argument: return "invalid argument";
        case invalid_usage: return "invalid usage";
        case remote_error: return "remote process exited or there was a network error";
        default: return "unknown result code";
    }
}

EXPORT const char* ncclGetLastError(Communicator*) { return ""; }
