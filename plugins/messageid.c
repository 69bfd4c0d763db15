/*
 *  messageid - supply the message ids.
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -I../include -o messageid.so messageid.c
 *
 *  The pattern: a function that several threads call at once. All other callbacks of a worker
 *  run on its thread, but mq_message_id may be called on any thread. So shared state must be
 *  safe to change from all threads: here one counter, with an atomic instruction.
 *
 *      MESSAGEID_PREFIX=name       starts every id (mq); letters, digits, "-", "_" and "."
 *
 *  An id is PREFIX-time-process-number, such as mq-19a1f2c3d4e-5f60718293a4b5c6-2a: the
 *  milliseconds since 1970, a random number of the process, and a counter, all hexadecimal.
 *  The random number keeps processes and machines apart, the counter keeps the ids of one
 *  process apart, and the time makes ids sort by age.
 *
 *  If several plugins export mq_message_id, only the last one in load order is called.
 */
#define _POSIX_C_SOURCE 200809L
#include <mailerq.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PREFIX_SIZE 32
#define ID_SIZE 96              /* the prefix, three numbers of 16 digits, three dashes */

static char prefix[PREFIX_SIZE + 1] = "mq";
static uint64_t process;
static uint64_t counter;

static uint64_t milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/**
 *  A number that is unique to this process: random, or made of time and process id in a jail
 *  without /dev.
 */
static uint64_t draw(void)
{
    uint64_t number;
    FILE *source = fopen("/dev/urandom", "rb");
    size_t read = source ? fread(&number, sizeof number, 1, source) : 0;
    if (source) fclose(source);
    if (read == 1) return number;
    MQ_Log(MQ_WARN, "no /dev/urandom: ids are unique by process id and time only");
    return (milliseconds() << 22) ^ (uint64_t)getpid();
}

MQ_EXPORT int mq_version(void)
{
    return MQ_API_VERSION;
}

MQ_EXPORT void mq_initialize(void)
{
    static const char allowed[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
    process = draw();
    const char *setting = getenv("MESSAGEID_PREFIX");
    if (!setting) return;
    size_t size = strlen(setting);
    if (size > 0 && size <= PREFIX_SIZE && strspn(setting, allowed) == size)
    {
        memcpy(prefix, setting, size + 1);
    }
    else
    {
        MQ_Log(MQ_WARN, "MESSAGEID_PREFIX: 1 to 32 letters, digits, '-', '_' or '.'; ignored");
    }
}

/** The size of the buffer for an id. Called once, at start. */
MQ_EXPORT size_t mq_message_id_size(void)
{
    return ID_SIZE;
}

/** Write an id without NUL and return its size, or 0 for no id. */
MQ_EXPORT size_t mq_message_id(char *buffer, size_t size)
{
    uint64_t number = __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED);
    /* snprintf needs one more byte, for NUL. */
    char id[ID_SIZE + 1];
    int length = snprintf(id, sizeof id, "%s-%" PRIx64 "-%016" PRIx64 "-%" PRIx64,
                          prefix, milliseconds(), process, number);
    if (length < 0 || (size_t)length > size) return 0;
    memcpy(buffer, id, (size_t)length);
    return (size_t)length;
}
