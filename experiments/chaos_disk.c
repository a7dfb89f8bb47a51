/* A disk that fails, for `experiments.chaos`: preloaded between a program and its C library.
 *
 * CHAOS_DISK names a folder. What is written to its file system fails or is slow while the file
 * CHAOS_FAULT, elsewhere, says so: "r" read-only, "i" an error of the device, "s" slow (20 ms for
 * every call). The file is looked at by every call, so that a fault may begin at any moment, and in
 * the middle of a file that is open, which a real remount refuses.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static int fault(void) {
  const char *path = getenv("CHAOS_FAULT");
  char what = 0;
  if (!path) return 0;
  int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  if (syscall(SYS_read, fd, &what, 1) != 1) what = 0;
  syscall(SYS_close, fd);
  return what;
}

static int ours(const struct stat *found) {
  struct stat disk;
  const char *folder = getenv("CHAOS_DISK");
  return folder && !stat(folder, &disk) && disk.st_dev == found->st_dev;
}

/* Whether a path, or what it would be made in, is on the disk. */
static int path_is_ours(int at, const char *path) {
  char parent[4096];
  struct stat found;
  const char *slash = strrchr(path, '/');
  if (!slash) strcpy(parent, ".");
  else if (slash == path) strcpy(parent, "/");
  else snprintf(parent, sizeof parent, "%.*s", (int)(slash - path), path);
  return !fstatat(at, parent, &found, 0) && ours(&found);
}

/* 0, or what errno is to be. */
static int verdict(int is_ours_now) {
  int what = is_ours_now ? fault() : 0;
  if (what == 's') {
    struct timespec wait = {0, 20 * 1000 * 1000};
    nanosleep(&wait, NULL);
  }
  return what == 'r' ? EROFS : what == 'i' ? EIO : 0;
}

static int verdict_of_fd(int fd) {
  struct stat found;
  int before = errno, wrong;
  if (!getenv("CHAOS_FAULT") || fstat(fd, &found) || !S_ISREG(found.st_mode)) return errno = before, 0;
  wrong = verdict(ours(&found));
  errno = before;
  return wrong;
}

static int verdict_of_path(int at, const char *path) {
  int before = errno, wrong;
  if (!getenv("CHAOS_FAULT")) return 0;
  wrong = verdict(path_is_ours(at, path));
  errno = before;
  return wrong;
}

#define NEXT(name) __typeof__(&name) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL_IF(wrong) do { int w = (wrong); if (w) return errno = w, -1; } while (0)
#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | __O_TMPFILE)) { \
  va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name) int name(const char *path, int flags, ...) { \
  MODE(flags) NEXT(name); \
  if (WRITES(flags)) FAIL_IF(verdict_of_path(AT_FDCWD, path)); \
  return next(path, flags, mode); }
#define OPENAT(name) int name(int at, const char *path, int flags, ...) { \
  MODE(flags) NEXT(name); \
  if (WRITES(flags)) FAIL_IF(verdict_of_path(at, path)); \
  return next(at, path, flags, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
  NEXT(write); FAIL_IF(verdict_of_fd(fd)); return next(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
  NEXT(writev); FAIL_IF(verdict_of_fd(fd)); return next(fd, parts, count);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t where) {
  NEXT(pwrite); FAIL_IF(verdict_of_fd(fd)); return next(fd, data, size, where);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t where) {
  NEXT(pwrite64); FAIL_IF(verdict_of_fd(fd)); return next(fd, data, size, where);
}
int fsync(int fd) { NEXT(fsync); FAIL_IF(verdict_of_fd(fd)); return next(fd); }
int fdatasync(int fd) { NEXT(fdatasync); FAIL_IF(verdict_of_fd(fd)); return next(fd); }
int ftruncate(int fd, off_t size) { NEXT(ftruncate); FAIL_IF(verdict_of_fd(fd)); return next(fd, size); }
int ftruncate64(int fd, off64_t size) {
  NEXT(ftruncate64); FAIL_IF(verdict_of_fd(fd)); return next(fd, size);
}
int mkdir(const char *path, mode_t mode) {
  NEXT(mkdir); FAIL_IF(verdict_of_path(AT_FDCWD, path)); return next(path, mode);
}
int mkdirat(int at, const char *path, mode_t mode) {
  NEXT(mkdirat); FAIL_IF(verdict_of_path(at, path)); return next(at, path, mode);
}
int unlink(const char *path) {
  NEXT(unlink); FAIL_IF(verdict_of_path(AT_FDCWD, path)); return next(path);
}
int unlinkat(int at, const char *path, int flags) {
  NEXT(unlinkat); FAIL_IF(verdict_of_path(at, path)); return next(at, path, flags);
}
int rmdir(const char *path) {
  NEXT(rmdir); FAIL_IF(verdict_of_path(AT_FDCWD, path)); return next(path);
}
int rename(const char *from, const char *to) {
  NEXT(rename); FAIL_IF(verdict_of_path(AT_FDCWD, to)); return next(from, to);
}
int renameat(int at, const char *from, int there, const char *to) {
  NEXT(renameat); FAIL_IF(verdict_of_path(there, to)); return next(at, from, there, to);
}
