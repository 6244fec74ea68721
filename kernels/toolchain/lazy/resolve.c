/* The number of a function in, its address out: opens the library at the first call.
 *
 * Looked for, in this order, in:
 *   the folders of HONE_CUDA_LIBS, separated by colons
 *   LD_LIBRARY_PATH and the system's folders
 *   $VIRTUAL_ENV/lib/python3.N/site-packages/nvidia/cu13/lib, where pip puts NVIDIA's packages
 *   /usr/local/cuda/lib64
 * Where there is none, every function answers with an error code of its own library, so that a program learns what it would
 * learn from a driver without a device.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <glob.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define JOINED(library, name) hone_lazy_##library##_##name
#define OF(library, name) JOINED(library, name)
#define NAMES OF(LIBRARY, names)
#define SLOTS OF(LIBRARY, slots)
#define RESOLVE OF(LIBRARY, resolve)

extern const char *const *const NAMES;
extern void **const SLOTS;

static void *library;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static long no_library(void) { return NO_LIBRARY; }
static long no_function(void) { return NO_FUNCTION; }
static const char *no_text(void) { return FILES " is not there or too old"; }

static void *open_in(const char *folder, size_t length) {
    char path[4096];
    if (length == 0 || snprintf(path, sizeof path, "%.*s/%s", (int)length, folder, FILES) >= (int)sizeof path) return NULL;
    return dlopen(path, RTLD_NOW | RTLD_GLOBAL);
}

static void *open_in_list(const char *folders) {
    void *found = NULL;
    while (folders != NULL && found == NULL) {
        const char *end = strchrnul(folders, ':');
        found = open_in(folders, (size_t)(end - folders));
        folders = *end == 0 ? NULL : end + 1;
    }
    return found;
}

static void *open_in_environment(const char *environment) {
    char pattern[4096];
    glob_t found;
    void *opened = NULL;
    if (environment == NULL ||
        snprintf(pattern, sizeof pattern, "%s/lib/python3.*/site-packages/nvidia/cu13/lib", environment) >= (int)sizeof pattern ||
        glob(pattern, 0, NULL, &found) != 0)
        return NULL;
    for (size_t i = 0; i < found.gl_pathc && opened == NULL; ++i) opened = open_in(found.gl_pathv[i], strlen(found.gl_pathv[i]));
    globfree(&found);
    return opened;
}

static void open_library(void) {
    library = open_in_list(getenv("HONE_CUDA_LIBS"));
    if (library == NULL) library = dlopen(FILES, RTLD_NOW | RTLD_GLOBAL);
    if (library == NULL) library = open_in_environment(getenv("VIRTUAL_ENV"));
    if (library == NULL) library = open_in_list("/usr/local/cuda/lib64");
}

/* Functions that give a text back, not a code. */
static int gives_text(const char *name) {
    return strstr(name, "GetStatusName") != NULL || strstr(name, "GetStatusString") != NULL || strcmp(name, "nvrtcGetErrorString") == 0;
}

/* Two threads may come here for one function: both write the same address, in one piece. */
__attribute__((visibility("hidden"))) void *RESOLVE(unsigned number);
void *RESOLVE(unsigned number) {
    pthread_once(&once, open_library);
    const char *name = NAMES[number];
    void *function = library == NULL ? NULL : dlsym(library, name);
    if (function == NULL) function = gives_text(name) ? (void *)no_text : library == NULL ? (void *)no_library : (void *)no_function;
    SLOTS[number] = function;
    return function;
}
