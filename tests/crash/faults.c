/*
 *  faults - a disk that fails and a clock that jumps, for a program that it is preloaded into.
 *
 *      cc -shared -fPIC -O1 -o faults.so faults.c -ldl -pthread
 *      FAULTS_CONTROL=control FAULTS_UNDER=/spool/queue LD_PRELOAD=./faults.so program
 *
 *  The file FAULTS_CONTROL is mapped by the program and by the test, and holds a struct control:
 *  the test writes what shall fail from now on, and reads how often something did. Only files
 *  below FAULTS_UNDER are concerned.
 *
 *  With FAULTS_JOURNAL every write, cut and sync of the queue file and its log is written down
 *  in a file, in the order in which they happened. From that a test makes what a power cut may
 *  leave on the disk: what was synced for sure, and of the rest whatever it likes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define NANOSECONDS 1000000000LL

enum call { SYNC, WRITE, TRUNCATE, OPEN, READ, CALLS };

/* Known to kit.py by its layout. */
struct control {
    int32_t error[CALLS];       /* the errno that such a call fails with; 0: it does not */
    int32_t one_in;             /* of so many calls one fails; 0 and 1: each */
    int32_t partial;            /* a write that fails has written its first half, as on a full disk */
    int32_t delay_ms;           /* a sync takes so much longer */
    int64_t clock_ns;           /* how far the wall clock is off */
    int64_t failed[CALLS];      /* how many have failed */
};

/* A record of the journal; `size` bytes of what was written follow a 'W'. */
struct entry {
    char kind;                  /* Write, Truncate, Sync, or a sync that Failed */
    char file;                  /* 'd' the database, 'w' its log, 'j' its journal */
    uint16_t unused;
    uint32_t size;
    int64_t offset;
};

static struct control none;
static struct control *control = &none;
static const char *under;
static int journal = -1;
static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;

static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pread)(int, void *, size_t, off_t);
static int (*real_fdatasync)(int);
static int (*real_fsync)(int);
static int (*real_ftruncate)(int, off_t);
static int (*real_open)(const char *, int, ...);
static int (*real_clock_gettime)(clockid_t, struct timespec *);

static void *find(const char *name)
{
    void *symbol = dlsym(RTLD_NEXT, name);
    if (!symbol) abort();
    return symbol;
}

__attribute__((constructor)) static void start(void)
{
    *(void **) &real_pwrite = find("pwrite64");
    *(void **) &real_write = find("write");
    *(void **) &real_pread = find("pread64");
    *(void **) &real_fdatasync = find("fdatasync");
    *(void **) &real_fsync = find("fsync");
    *(void **) &real_ftruncate = find("ftruncate64");
    *(void **) &real_open = find("open64");
    *(void **) &real_clock_gettime = find("clock_gettime");
    under = getenv("FAULTS_UNDER");
    const char *path = getenv("FAULTS_CONTROL");
    if (path) {
        int file = real_open(path, O_RDWR | O_CLOEXEC);
        void *memory = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (memory == MAP_FAILED) abort();
        control = memory;
        close(file);
    }
    path = getenv("FAULTS_JOURNAL");
    if (path) {
        journal = real_open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (journal < 0) abort();
    }
}

/** The path of a file below FAULTS_UNDER; false for all others. */
static bool concerned(int file, char *path, size_t size)
{
    char link[64];
    char digits[16];
    int count = 0;
    if (!under || file < 0) return false;
    do digits[count++] = (char) ('0' + file % 10); while ((file /= 10));
    char *end = stpcpy(link, "/proc/self/fd/");
    while (count) *end++ = digits[--count];
    *end = 0;
    ssize_t length = readlink(link, path, size - 1);
    if (length < 0) return false;
    path[length] = 0;
    return strncmp(path, under, strlen(under)) == 0;
}

/** Whether a call fails now; errno then says with what. */
static bool fails(enum call call, int file)
{
    static int turn;
    char path[4096];
    int error = control->error[call];
    if (!error) return false;
    int saved = errno;
    bool ours = concerned(file, path, sizeof path);
    errno = saved;
    if (!ours) return false;
    if (control->one_in > 1 && __atomic_fetch_add(&turn, 1, __ATOMIC_RELAXED) % control->one_in) {
        return false;
    }
    __atomic_fetch_add(&control->failed[call], 1, __ATOMIC_RELAXED);
    errno = error;
    return true;
}

/** Which of the journalled files this is; 0 for none. */
static char letter(int file)
{
    char path[4096];
    if (journal < 0 || !concerned(file, path, sizeof path)) return 0;
    const char *name = strrchr(path, '/') + 1;
    if (strcmp(name, "queue.db") == 0) return 'd';
    if (strcmp(name, "queue.db-wal") == 0) return 'w';
    return strcmp(name, "queue.db-journal") == 0 ? 'j' : 0;
}

static void note(char kind, char file, const void *data, uint32_t size, int64_t offset)
{
    struct entry entry = {kind, file, 0, size, offset};
    int saved = errno;
    if (real_write(journal, &entry, sizeof entry) != sizeof entry) abort();
    if (data && real_write(journal, data, size) != (ssize_t) size) abort();
    errno = saved;
}

static ssize_t do_pwrite(int file, const void *data, size_t size, off_t offset)
{
    if (fails(WRITE, file)) {
        int error = errno;
        if (control->partial && size > 1) return real_pwrite(file, data, size / 2, offset);
        errno = error;
        return -1;
    }
    char which = letter(file);
    if (!which) return real_pwrite(file, data, size, offset);
    pthread_mutex_lock(&order);
    ssize_t written = real_pwrite(file, data, size, offset);
    if (written > 0) note('W', which, data, (uint32_t) written, offset);
    pthread_mutex_unlock(&order);
    return written;
}

ssize_t pwrite(int file, const void *data, size_t size, off_t offset)
{
    return do_pwrite(file, data, size, offset);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset)
{
    return do_pwrite(file, data, size, offset);
}

ssize_t write(int file, const void *data, size_t size)
{
    return fails(WRITE, file) ? -1 : real_write(file, data, size);
}

ssize_t pread64(int file, void *data, size_t size, off64_t offset)
{
    return fails(READ, file) ? -1 : real_pread(file, data, size, offset);
}

static int sync_by(int (*real)(int), int file)
{
    char which = letter(file);
    if (control->delay_ms) {
        struct timespec pause = {control->delay_ms / 1000, control->delay_ms % 1000 * 1000000L};
        nanosleep(&pause, NULL);
    }
    bool failing = fails(SYNC, file);
    int error = errno;
    if (which) pthread_mutex_lock(&order);
    /* After a failure the kernel takes the pages for clean: what was to be synced never will be. */
    int result = failing ? -1 : real(file);
    if (which) {
        note(result ? 'F' : 'S', which, NULL, 0, 0);
        pthread_mutex_unlock(&order);
    }
    if (failing) errno = error;
    return result;
}

int fdatasync(int file)
{
    return sync_by(real_fdatasync, file);
}

int fsync(int file)
{
    return sync_by(real_fsync, file);
}

static int do_ftruncate(int file, off_t size)
{
    if (fails(TRUNCATE, file)) return -1;
    char which = letter(file);
    if (!which) return real_ftruncate(file, size);
    pthread_mutex_lock(&order);
    int result = real_ftruncate(file, size);
    if (!result) note('T', which, NULL, 0, size);
    pthread_mutex_unlock(&order);
    return result;
}

int ftruncate(int file, off_t size)
{
    return do_ftruncate(file, size);
}

int ftruncate64(int file, off64_t size)
{
    return do_ftruncate(file, size);
}

static int do_open(const char *path, int flags, va_list arguments)
{
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
    int file = real_open(path, flags, mode);
    if (file < 0 || !fails(OPEN, file)) return file;
    int error = errno;
    close(file);
    errno = error;
    return -1;
}

int open(const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    int file = do_open(path, flags, arguments);
    va_end(arguments);
    return file;
}

int open64(const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    int file = do_open(path, flags, arguments);
    va_end(arguments);
    return file;
}

int clock_gettime(clockid_t which, struct timespec *now)
{
    int result = real_clock_gettime(which, now);
    if (!result && which == CLOCK_REALTIME && control->clock_ns) {
        int64_t time = now->tv_sec * NANOSECONDS + now->tv_nsec + control->clock_ns;
        now->tv_sec = time / NANOSECONDS;
        now->tv_nsec = time % NANOSECONDS;
    }
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec precise;
    (void) zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *place)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (place) *place = now.tv_sec;
    return now.tv_sec;
}
