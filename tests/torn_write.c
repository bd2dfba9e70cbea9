/* A disk that hangs in the middle of a write, preloaded (LD_PRELOAD): of a file whose path begins with TORN_FILE no more
   is taken than TORN_BYTES, and its process stands still for ever. It says which it is in the file TORN_MARK; where that
   is there already, it has been, and the disk is well again. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int is_torn(int file) {
    const char *torn = getenv("TORN_FILE");
    char name[32], path[PATH_MAX] = "";
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    return torn && readlink(name, path, sizeof path - 1) > 0 && !strncmp(path, torn, strlen(torn));
}

ssize_t write(int file, const void *content, size_t size) {
    static __typeof__(&write) real;
    if (!real) real = dlsym(RTLD_NEXT, "write");
    int mark = is_torn(file) ? open(getenv("TORN_MARK"), O_CREAT | O_EXCL | O_WRONLY, 0600) : -1;
    if (mark < 0) return real(file, content, size);
    size_t taken = atol(getenv("TORN_BYTES"));
    real(file, content, size < taken ? size : taken);
    dprintf(mark, "%d\n", getpid());
    for (;;) pause();
}
