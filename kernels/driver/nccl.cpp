// libnccl: collectives between processes of one machine, through shared memory.
//
// A communicator is a file of /dev/shm that its unique id names, and one more for each rank's data. A call takes this
// rank's values and returns. A thread of the communicator gives them to the others, waits for all ranks, and combines
// them in the order of the ranks; sums are taken in f64. The result arrives in its stream as late as the program allows
// (streams.h), and a call that does not lie behind the last use of its buffer leaves 0xff. Ranks that make different
// calls get an error that names both. A rank whose process is gone is ncclRemoteError for the others. The environment
// sets:
//   HONE_FAKE_NCCL_DIE       RANK:CALL, the rank's process is killed at this collective, counted from 1; 0: when it connects
//   HONE_FAKE_NCCL_HANG      RANK:CALL, the rank never comes to this collective
//   HONE_FAKE_NCCL_OTHER     RANK:CALL, the rank passes one value less to this collective
//   HONE_FAKE_NCCL_SWAP      RANK:CALL, the rank makes this collective after the next one
//   HONE_FAKE_NCCL_DELAY     milliseconds that a rank waits before each collective, times a number of 0 to 3 that differs
//   HONE_FAKE_NCCL_SEED      draws these numbers (0)
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
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "driver/device.h"
#include "driver/streams.h"

#define API EXPORT int

namespace {

// The values of ncclResult_t that are returned.
enum { ok = 0, system_error = 2, invalid_argument = 4, invalid_usage = 5, remote_error = 6, in_progress = 7 };
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

// The state of a rank in the current call. A rank writes its fields before it arrives; others read them after all have
// arrived.
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
    int rank, world;
    std::atomic<int> error{in_progress};
    uint64_t calls = 0;
    Shared* shared;
    std::string last_error;

    // The thread's tasks in order, and the number of those that are not done.
    std::thread thread;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> jobs;
    int open = 0;
    bool leaves = false;
    // A task that waits until the next one has been added.
    std::function<void()> held;

    void add(std::function<void()> job, bool after_the_next) {
        const std::lock_guard<std::mutex> hold(mutex);
        if (after_the_next) {
            held = std::move(job);
            return;
        }
        jobs.push_back(std::move(job));
        if (held) jobs.push_back(std::move(held));
        held = nullptr;
        changed.notify_all();
    }

    void work() {
        std::unique_lock<std::mutex> hold(mutex);
        while (true) {
            changed.wait(hold, [this] { return leaves || !jobs.empty(); });
            if (jobs.empty()) return;
            const std::function<void()> job = std::move(jobs.front());
            jobs.pop_front();
            hold.unlock();
            job();
            hold.lock();
        }
    }
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
    const int file = open(("/dev/shm/" + name).c_str(), O_RDWR | (grow ? O_CREAT : 0) | O_CLOEXEC, 0600);
    if (file < 0) return nullptr;
    void* memory = MAP_FAILED;
    struct stat found;
    const bool is_whole = grow ? ftruncate(file, (off_t)bytes) == 0 : fstat(file, &found) == 0 && found.st_size >= (off_t)bytes;
    if (is_whole) memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return memory == MAP_FAILED ? nullptr : memory;
}

std::string data_of(const Communicator& comm, int rank) { return comm.name + "-" + std::to_string(rank); }

// Waits until every rank is here.
int meet(Communicator& comm) {
    Shared& shared = *comm.shared;
    const uint64_t round = shared.round.load();
    if (shared.arrived.fetch_add(1) + 1 == comm.world) {
        // A rank that arrived may have left again.
        if (shared.aborted.load() != 0) return remote_error;
        shared.arrived.store(0);
        shared.round.fetch_add(1);
        return ok;
    }
    const uint64_t patience = 20000 * number("HONE_FAKE_NCCL_PATIENCE", 60);
    for (uint64_t looks = 0; shared.round.load() == round; ++looks) {
        if (shared.aborted.load() != 0 && shared.round.load() == round) return remote_error;
        for (int rank = 0; looks % 200 == 199 && rank < comm.world; ++rank) {
            const int process = shared.seats[rank].process.load();
            // A rank that left after it had arrived is not an error.
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

// A collective that the program called.
struct Call {
    const char* what;
    uint64_t number, count, said;
    int type;
    std::vector<char> values, result;
    int error = ok;
    // The function that adds one rank's bytes to the result; it is called in the order of the ranks.
    std::function<void(int, const void*)> use;
    std::function<void()> end;
};

// An error if the ranks do not make the same call.
int compare(Communicator& comm, const Call& call) {
    const Seat& own = comm.shared->seats[comm.rank];
    for (int rank = 0; rank < comm.world; ++rank) {
        const Seat& other = comm.shared->seats[rank];
        if (strcmp(own.what, other.what) == 0 && own.count == other.count && own.type == other.type) continue;
        char text[300];
        snprintf(text, sizeof text, "at call %llu rank %d calls %s of %llu values of type %d, and rank %d calls %s of %llu values of type %d",
                 (unsigned long long)call.number, comm.rank, own.what, (unsigned long long)own.count, own.type, rank, other.what,
                 (unsigned long long)other.count, other.type);
        const std::lock_guard<std::mutex> hold(comm.mutex);
        comm.last_error = text;
        return invalid_usage;
    }
    return ok;
}

// A number of 0 to 3 for a call of a rank.
uint64_t drawn(uint64_t call, int rank) {
    uint64_t mixed = (call * 64 + (uint64_t)rank + 1) * 0x9e3779b97f4a7c15 + number("HONE_FAKE_NCCL_SEED", 0) * 0xbf58476d1ce4e5b9;
    mixed = (mixed ^ (mixed >> 29)) * 0x94d049bb133111eb;
    return mixed >> 62;
}

// Gives this rank's bytes, and has `use` read those of each rank in order.
int exchange(Communicator& comm, const Call& call) {
    if (comm.error != ok) return comm.error;
    sleep_milliseconds(number("HONE_FAKE_NCCL_DELAY", 0) * drawn(call.number, comm.rank));
    Seat& seat = comm.shared->seats[comm.rank];
    snprintf(seat.what, sizeof seat.what, "%s", call.what);
    seat.count = call.said;
    seat.type = call.type;
    const size_t bytes = call.values.size();
    void* own = mapped(data_of(comm, comm.rank), bytes + 1, true);
    if (own == nullptr) return system_error;
    memcpy(own, call.values.data(), bytes);
    munmap(own, bytes + 1);
    int error = meet(comm);
    if (error == ok) error = compare(comm, call);
    for (int rank = 0; error == ok && rank < comm.world; ++rank) {
        void* data = mapped(data_of(comm, rank), bytes + 1, false);
        if (data == nullptr) return system_error;
        call.use(rank, data);
        munmap(data, bytes + 1);
    }
    // No rank writes its next values before all have read these.
    return error == ok ? meet(comm) : error;
}

// Queues a call in a stream: `to` gets its result when the ranks have met and the stream comes to it.
int collective(Communicator* comm, const std::shared_ptr<Call>& call, const void* from, size_t bytes, void* to, size_t result_bytes,
               void* stream) {
    if (comm->error != ok) return comm->error;
    call->number = ++comm->calls;
    call->said = call->count - is_named("HONE_FAKE_NCCL_OTHER", *comm);
    tell(*comm, call->what, call->count, call->type);
    if (is_named("HONE_FAKE_NCCL_DIE", *comm)) kill(getpid(), SIGKILL);
    while (is_named("HONE_FAKE_NCCL_HANG", *comm)) sleep_milliseconds(1000);
    const std::shared_ptr<fake::Pending> pending = std::make_shared<fake::Pending>();
    for (int rank = 0; rank < comm->world; ++rank) {
        pending->needs_threads |= rank != comm->rank && comm->shared->seats[rank].process == getpid();
    }
    {
        const std::lock_guard<std::mutex> hold(fake::lock);
        if (!fake::is_allocated((fake::Address)from, bytes) || !fake::is_allocated((fake::Address)to, result_bytes)) return invalid_argument;
        call->values.assign((const char*)from, (const char*)from + bytes);
        fake::queue(
            stream, (fake::Address)to, result_bytes,
            [call, to] {
                if (call->error == ok) memcpy(to, call->result.data(), call->result.size());
            },
            pending);
        fake::touch(stream, (fake::Address)from);
    }
    const std::function<void()> job = [comm, call, pending] {
        call->error = exchange(*comm, *call);
        if (call->error == ok && call->end) call->end();
        if (call->error != ok) comm->error = call->error;
        {
            const std::lock_guard<std::mutex> hold(comm->mutex);
            --comm->open;
        }
        pending->end();
    };
    {
        const std::lock_guard<std::mutex> hold(comm->mutex);
        ++comm->open;
    }
    comm->add(job, is_named("HONE_FAKE_NCCL_SWAP", *comm));
    return ok;
}

int leave(Communicator* comm, bool abort) {
    if (comm == nullptr) return invalid_argument;
    {
        const std::lock_guard<std::mutex> hold(comm->mutex);
        // A rank that leaves in the middle of a collective leaves the others without it.
        if (abort || comm->open > 0) comm->shared->aborted.store(1);
        comm->leaves = true;
        if (comm->held) comm->jobs.push_back(std::move(comm->held));
        comm->held = nullptr;
        comm->changed.notify_all();
    }
    comm->thread.join();
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
    if (is_named("HONE_FAKE_NCCL_DIE", *comm)) kill(getpid(), SIGKILL);
    comm->shared->seats[rank].process.store(getpid());
    comm->jobs.push_back([comm] { comm->error = meet(*comm); });
    comm->thread = std::thread([comm] { comm->work(); });
    *to = comm;
    return in_progress;
}

API ncclCommGetAsyncError(Communicator* comm, int* to) {
    if (comm == nullptr) return invalid_argument;
    *to = comm->error;
    return ok;
}

API ncclCommAbort(Communicator* comm) { return leave(comm, true); }
API ncclCommDestroy(Communicator* comm) { return leave(comm, false); }

API ncclAllReduce(const void* from, void* to, size_t count, int type, int operation, Communicator* comm, void* stream) {
    if (comm == nullptr) return invalid_argument;
    if (type != float32 || operation != 0) return invalid_usage;
    const std::shared_ptr<Call> call = std::make_shared<Call>();
    call->what = "AllReduce";
    call->count = count;
    call->type = type;
    // Adding to -0 changes no bit of a value.
    const auto sums = std::make_shared<std::vector<double>>(count, -0.);
    call->use = [sums, count](int, const void* data) {
        for (size_t i = 0; i < count; ++i) (*sums)[i] += (double)((const float*)data)[i];
    };
    Call* const of = call.get();
    call->end = [sums, count, of] {
        of->result.resize(4 * count);
        for (size_t i = 0; i < count; ++i) ((float*)of->result.data())[i] = (float)(*sums)[i];
    };
    return collective(comm, call, from, 4 * count, to, 4 * count, stream);
}

API ncclAllGather(const void* from, void* to, size_t count, int type, Communicator* comm, void* stream) {
    if (comm == nullptr) return invalid_argument;
    if (type != uint8) return invalid_usage;
    const std::shared_ptr<Call> call = std::make_shared<Call>();
    call->what = "AllGather";
    call->count = count;
    call->type = type;
    call->result.resize(count * comm->world);
    Call* const of = call.get();
    call->use = [of, count](int rank, const void* data) { memcpy(of->result.data() + (size_t)rank * count, data, count); };
    return collective(comm, call, from, count, to, count * comm->world, stream);
}

EXPORT const char* ncclGetErrorString(int error) {
    switch (error) {
        case ok: return "no error";
        case system_error: return "unhandled system error";
        case invalid_argument: return "invalid argument";
        case invalid_usage: return "invalid usage";
        case in_progress: return "operation in progress";
        case remote_error: return "remote process exited or there was a network error";
        default: return "unknown result code";
    }
}

EXPORT const char* ncclGetLastError(Communicator* comm) {
    if (comm == nullptr) return "";
    const std::lock_guard<std::mutex> hold(comm->mutex);
    return comm->last_error.c_str();
}
