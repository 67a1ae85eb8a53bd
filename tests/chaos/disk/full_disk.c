/* Preloaded into a process, it counts what would use space below one folder, and refuses some of it as a full disk does.

   FULL_DISK_ROOT is the folder. FULL_DISK_STATE is a file of three 64-bit numbers, shared by all processes: the calls
   counted, the number of the first that is refused (0: none), and how many are. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

struct state { long count, first, length; };

static struct state *state;
static const char *root;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("FULL_DISK_STATE");
    root = getenv("FULL_DISK_ROOT");
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    int fd = path && root ? real_open(path, O_RDWR) : -1;
    if (fd < 0) return;
    void *mapped = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED) state = mapped;
}

static int is_below_root(const char *path) {
    size_t length = strlen(root);
    return !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

static int is_file_below_root(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below_root(path);
}

static int is_path_below_root(int folder, const char *path) {
    char here[PATH_MAX];
    if (path[0] == '/') return is_below_root(path);
    return folder == AT_FDCWD ? getcwd(here, sizeof here) && is_below_root(here) : is_file_below_root(folder);
}

/* Counts one call; returns whether there is no room for it. */
static int is_full(void) {
    long number = __atomic_add_fetch(&state->count, 1, __ATOMIC_SEQ_CST);
    if (!state->first || number < state->first || number >= state->first + state->length) return 0;
    errno = ENOSPC;
    return 1;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define REFUSE_IF(condition) do { int saved = errno; if (state && (condition) && is_full()) return -1; errno = saved; } while (0)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write); REFUSE_IF(is_file_below_root(fd)); return real(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int num_parts) {
    REAL(writev); REFUSE_IF(is_file_below_root(fd)); return real(fd, parts, num_parts);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(pwrite); REFUSE_IF(is_file_below_root(fd)); return real(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64); REFUSE_IF(is_file_below_root(fd)); return real(fd, data, size, at);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    static ssize_t (*real)(int, int, off_t *, size_t);
    if (!real) real = (ssize_t (*)(int, int, off_t *, size_t))dlsym(RTLD_NEXT, "sendfile");
    REFUSE_IF(is_file_below_root(out)); return real(out, in, at, size);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    static ssize_t (*real)(int, int, off64_t *, size_t);
    if (!real) real = (ssize_t (*)(int, int, off64_t *, size_t))dlsym(RTLD_NEXT, "sendfile64");
    REFUSE_IF(is_file_below_root(out)); return real(out, in, at, size);
}
ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t size, unsigned flags) {
    REAL(copy_file_range); REFUSE_IF(is_file_below_root(out)); return real(in, in_at, out, out_at, size, flags);
}
int fsync(int fd) { REAL(fsync); REFUSE_IF(is_file_below_root(fd)); return real(fd); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); REFUSE_IF(is_file_below_root(fd)); return real(fd, size); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); REFUSE_IF(is_file_below_root(fd)); return real(fd, size); }
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir); REFUSE_IF(is_path_below_root(AT_FDCWD, path)); return real(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat); REFUSE_IF(is_path_below_root(folder, path)); return real(folder, path, mode);
}
int rename(const char *from, const char *to) {
    REAL(rename); REFUSE_IF(is_path_below_root(AT_FDCWD, to)); return real(from, to);
}
int link(const char *from, const char *to) {
    REAL(link); REFUSE_IF(is_path_below_root(AT_FDCWD, to)); return real(from, to);
}
int linkat(int folder, const char *from, int other, const char *to, int flags) {
    REAL(linkat); REFUSE_IF(is_path_below_root(other, to)); return real(folder, from, other, to, flags);
}

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

int open(const char *path, int flags, ...) {
    REAL(open); MODE(flags); REFUSE_IF(flags & O_CREAT && is_path_below_root(AT_FDCWD, path)); return real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    REAL(open64); MODE(flags); REFUSE_IF(flags & O_CREAT && is_path_below_root(AT_FDCWD, path)); return real(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    REAL(openat); MODE(flags); REFUSE_IF(flags & O_CREAT && is_path_below_root(folder, path)); return real(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
    REAL(openat64); MODE(flags); REFUSE_IF(flags & O_CREAT && is_path_below_root(folder, path)); return real(folder, path, flags, mode);
}
