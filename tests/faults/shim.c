/* A machine that fails, for LD_PRELOAD.
 *
 * The disk: counts the calls by which a process changes files, and at the call number FAULT_AT does what FAULT says:
 * `kill` (before the call), `after` (kill after the call), `half` (kill in the middle of a write), `short` (writes a
 * part), `eio` (this call fails), `bad` (this call and every later one fails), `full` (this call and every later one
 * finds the disk full), `term` (SIGTERM before the call), `twice` (two of them). `read` is apart: it counts the calls by
 * which the process opens and reads files of its folder, and the one at FAULT_AT fails. Without FAULT it only counts:
 * both numbers of calls are written to the file FAULT_COUNT at the end.
 *
 * The clock, with FAULT_CLOCK=SECONDS: the time of day is off by so much, and every wait is short: what the process
 * would have slept passes on its clocks at once. FAULT_JUMP=SECONDS sets the time of day off by so much from the
 * hundredth look on.
 *
 * Other ranks: with FAULT_RANK=N, the process of that rank counts what it sends to others, and is killed before the send
 * number FAULT_SEND. The count is written to the file FAULT_SENDS at the end.
 *
 * FAULT_QUICK: nothing waits for the disk, and the program cannot read its own file, so that it does not hash it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum verdict { PASS, FAIL, HALF, SHORT, AFTER };
enum { FILES_MAX = 4096 };

static atomic_long calls, reads;
static const char *fault;
static long at;

__attribute__((constructor)) static void begin(void) {
    const char *number = getenv("FAULT_AT");
    fault = getenv("FAULT");
    at = number ? atol(number) : 0;
}

static int is(const char *name) { return !strcmp(fault, name); }

static void die(void) { kill(getpid(), SIGKILL), pause(); }

static int is_quick(void) {
    static int known = -1;
    if (known < 0) known = getenv("FAULT_QUICK") != 0;
    return known;
}

static enum verdict judge(int frees_space) {
    long call = atomic_fetch_add(&calls, 1) + 1;
    if (!fault || call < at) return PASS;
    if (is("full") && !frees_space) return errno = ENOSPC, FAIL;
    if (is("bad")) return errno = EIO, FAIL;
    if (call != at) return PASS;
    if (is("kill")) die();
    if (is("term") || is("twice")) kill(getpid(), SIGTERM);
    if (is("twice")) usleep(2000), kill(getpid(), SIGTERM);
    if (is("eio")) return errno = EIO, FAIL;
    return is("half") ? HALF : is("short") ? SHORT : is("after") ? AFTER : PASS;
}

static enum verdict judge_read(void) {
    long call = atomic_fetch_add(&reads, 1) + 1;
    return fault && is("read") && call == at ? errno = EIO, FAIL : PASS;
}

/* Pipes, sockets and devices are no disk, and the log is no part of what must survive. */
static int on_disk(int file) {
    struct stat found;
    int before = errno;
    int is = file > 2 && !fstat(file, &found) && (S_ISREG(found.st_mode) || S_ISDIR(found.st_mode));
    errno = before;
    return is;
}

static int is_device(const char *path) { return !strncmp(path, "/dev/", 5) || !strncmp(path, "/proc/", 6); }

/* Files that the process reads of its own folder: by relative paths, or below HOME. */
static atomic_char own[FILES_MAX];

static int is_own(const char *path) {
    const char *home = getenv("HOME");
    return path[0] != '/' || (home && !strncmp(path, home, strlen(home)));
}

#define REAL(result, name, ...)                                                                                        \
    static result (*real)(__VA_ARGS__);                                                                                \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t write(int file, const void *bytes, size_t count) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (!on_disk(file)) return real(file, bytes, count);
    ssize_t done;
    switch (judge(0)) {
    case FAIL: return -1;
    case HALF: real(file, bytes, count / 2), die(); /* fall through */
    case SHORT: return real(file, bytes, count > 1 ? count / 2 : count);
    case AFTER: done = real(file, bytes, count), die(); return done;
    default: return real(file, bytes, count);
    }
}

/* Makes a call after the verdict on it. */
#define JUDGED(frees_space, call)                                                                                      \
    switch (judge(frees_space)) {                                                                                      \
    case FAIL: return -1;                                                                                              \
    case AFTER: call, die(); /* fall through */                                                                        \
    default: return call;                                                                                              \
    }

#define ON_FILE(name)                                                                                                  \
    int name(int file) {                                                                                               \
        REAL(int, #name, int);                                                                                         \
        if (!on_disk(file)) return real(file);                                                                         \
        JUDGED(0, is_quick() ? 0 : real(file))                                                                         \
    }
ON_FILE(fsync)
ON_FILE(fdatasync)

int ftruncate64(int file, off64_t length) {
    REAL(int, "ftruncate64", int, off64_t);
    JUDGED(1, real(file, length))
}

int open64(const char *path, int flags, ...) {
    REAL(int, "open64", const char *, int, ...);
    mode_t mode = 0;
    if (flags & O_CREAT) {
        va_list rest;
        va_start(rest, flags);
        mode = va_arg(rest, int);
        va_end(rest);
    }
    if (is_quick() && !strcmp(path, "/proc/self/exe")) return errno = EACCES, -1;
    if ((flags & (O_CREAT | O_TRUNC)) && !is_device(path)) JUDGED(0, real(path, flags, mode))
    int reads = (flags & O_ACCMODE) == O_RDONLY && is_own(path);
    if (reads && judge_read() == FAIL) return -1;
    int file = real(path, flags, mode);
    if (file >= 0 && file < FILES_MAX) atomic_store(&own[file], reads && on_disk(file));
    return file;
}

ssize_t read(int file, void *bytes, size_t count) {
    REAL(ssize_t, "read", int, void *, size_t);
    int counts = file >= 0 && file < FILES_MAX && atomic_load(&own[file]);
    return counts && judge_read() == FAIL ? -1 : real(file, bytes, count);
}

int close(int file) {
    REAL(int, "close", int);
    if (file >= 0 && file < FILES_MAX) atomic_store(&own[file], 0);
    return real(file);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    JUDGED(0, real(path, mode))
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    JUDGED(0, real(from, to))
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    JUDGED(1, real(path))
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    JUDGED(1, real(folder, path, flags))
}

int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    JUDGED(1, real(path))
}

/* ---- other ranks ---- */

static atomic_long sends;

static int is_rank(void) {
    static int known = -1;
    const char *wanted = getenv("FAULT_RANK"), *rank = getenv("HONE_RANK");
    if (known < 0) known = wanted && rank && !strcmp(wanted, rank);
    return known;
}

ssize_t send(int socket, const void *bytes, size_t count, int flags) {
    REAL(ssize_t, "send", int, const void *, size_t, int);
    const char *at = getenv("FAULT_SEND");
    if (is_rank() && atomic_fetch_add(&sends, 1) + 1 == (at ? atol(at) : 0)) die();
    return real(socket, bytes, count, flags);
}

/* ---- the clock ---- */

/* The network gets so long for each wait: one of the process's own second takes a few tens of milliseconds. */
enum { SECOND = 1000000000, PATIENCE_MS = 2 };

/* Nanoseconds that have passed on the process's clocks alone. */
static atomic_llong skipped;
static atomic_long looks;

static int is_virtual(void) {
    static int known = -1;
    if (known < 0) known = getenv("FAULT_CLOCK") != 0;
    return known;
}

static long long nanoseconds(const struct timespec *time) { return time->tv_sec * (long long)SECOND + time->tv_nsec; }

static struct timespec timespec_of(long long time) { return (struct timespec){time / SECOND, time % SECOND}; }

static void pass(long long time) {
    if (time > 0) atomic_fetch_add(&skipped, time);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int failed = real(clock, time);
    if (failed || !is_virtual() || clock == CLOCK_PROCESS_CPUTIME_ID || clock == CLOCK_THREAD_CPUTIME_ID) return failed;
    *time = timespec_of(nanoseconds(time) + atomic_load(&skipped));
    if (clock != CLOCK_REALTIME) return 0;
    const char *jump = getenv("FAULT_JUMP");
    time->tv_sec += atoll(jump && atomic_fetch_add(&looks, 1) >= 100 ? jump : getenv("FAULT_CLOCK"));
    return 0;
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *time, struct timespec *left) {
    REAL(int, "clock_nanosleep", clockid_t, int, const struct timespec *, struct timespec *);
    if (!is_virtual()) return real(clock, flags, time, left);
    struct timespec now, little = {0, 1000000};
    clock_gettime(clock, &now);
    long long wait = nanoseconds(time) - (flags & TIMER_ABSTIME ? nanoseconds(&now) : 0);
    if (wait <= nanoseconds(&little)) little = timespec_of(wait > 0 ? wait : 0);
    real(CLOCK_MONOTONIC, 0, &little, 0);
    pass(wait - nanoseconds(&little));
    return 0;
}

int nanosleep(const struct timespec *time, struct timespec *left) {
    return (errno = clock_nanosleep(CLOCK_MONOTONIC, 0, time, left)) ? -1 : 0;
}

int epoll_wait(int epoll, struct epoll_event *events, int count, int timeout) {
    REAL(int, "epoll_wait", int, struct epoll_event *, int, int);
    if (!is_virtual() || timeout <= PATIENCE_MS) return real(epoll, events, count, timeout);
    int found = real(epoll, events, count, PATIENCE_MS);
    if (found == 0) pass((timeout - PATIENCE_MS) * 1000000LL);
    return found;
}

/* Waits of threads for one another end at a time of the process's clock. */
long syscall(long number, ...) {
    REAL(long, "syscall", long, ...);
    long a[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(rest, long);
    va_end(rest);
    const struct timespec *end = (const struct timespec *)a[3];
    int waits = number == SYS_futex && (a[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET && end;
    struct timespec true_end;
    if (waits && is_virtual()) {
        long long time = nanoseconds(end) - atomic_load(&skipped);
        true_end = timespec_of(time > 0 ? time : 0);
        a[3] = (long)&true_end;
    }
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

__attribute__((destructor)) static void tell(void) {
    const char *path = getenv("FAULT_COUNT");
    FILE *file = path ? fopen(path, "w") : 0;
    if (file) fprintf(file, "%ld %ld", atomic_load(&calls), atomic_load(&reads)), fclose(file);
    path = is_rank() ? getenv("FAULT_SENDS") : 0;
    file = path ? fopen(path, "w") : 0;
    if (file) fprintf(file, "%ld\n", atomic_load(&sends)), fclose(file);
}
