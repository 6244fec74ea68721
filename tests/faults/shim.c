/* A disk that fails, for LD_PRELOAD: counts the calls by which a process changes files, and at the call number
 * FAULT_AT does what FAULT says: `kill` (before the call), `half` (kill in the middle of a write), `eio` (this call
 * fails), `full` (this call and every later one finds the disk full), `term` (SIGTERM before the call). Without FAULT it
 * only counts: the number of calls is written to the file FAULT_COUNT at the end. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum verdict { PASS, FAIL, HALF };

static atomic_long calls;

static enum verdict judge(int frees_space) {
    static const char *fault;
    static long at = -1;
    if (at < 0) {
        const char *number = getenv("FAULT_AT");
        fault = getenv("FAULT");
        at = number ? atol(number) : 0;
    }
    long call = atomic_fetch_add(&calls, 1) + 1;
    if (!fault || call < at) return PASS;
    if (!strcmp(fault, "full") && !frees_space) return errno = ENOSPC, FAIL;
    if (call != at) return PASS;
    if (!strcmp(fault, "kill")) kill(getpid(), SIGKILL), pause();
    if (!strcmp(fault, "term")) kill(getpid(), SIGTERM);
    if (!strcmp(fault, "eio")) return errno = EIO, FAIL;
    return strcmp(fault, "half") ? PASS : HALF;
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

#define REAL(result, name, ...)                                                                                        \
    static result (*real)(__VA_ARGS__);                                                                                \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t write(int file, const void *bytes, size_t count) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (!on_disk(file)) return real(file, bytes, count);
    switch (judge(0)) {
    case FAIL: return -1;
    case HALF: real(file, bytes, count / 2), kill(getpid(), SIGKILL), pause(); /* fall through */
    default: return real(file, bytes, count);
    }
}

#define ON_FILE(name)                                                                                                  \
    int name(int file) {                                                                                               \
        REAL(int, #name, int);                                                                                         \
        return on_disk(file) && judge(0) == FAIL ? -1 : real(file);                                                    \
    }
ON_FILE(fsync)
ON_FILE(fdatasync)

int ftruncate64(int file, off64_t length) {
    REAL(int, "ftruncate64", int, off64_t);
    return judge(1) == FAIL ? -1 : real(file, length);
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
    int changes = (flags & (O_CREAT | O_TRUNC)) && !is_device(path);
    return changes && judge(0) == FAIL ? -1 : real(path, flags, mode);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return judge(0) == FAIL ? -1 : real(path, mode);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return judge(0) == FAIL ? -1 : real(from, to);
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    return judge(1) == FAIL ? -1 : real(path);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    return judge(1) == FAIL ? -1 : real(folder, path, flags);
}

int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    return judge(1) == FAIL ? -1 : real(path);
}

__attribute__((destructor)) static void tell(void) {
    const char *path = getenv("FAULT_COUNT");
    FILE *file = path ? fopen(path, "w") : 0;
    if (file) fprintf(file, "%ld", atomic_load(&calls)), fclose(file);
}
