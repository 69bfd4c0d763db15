/*
 *  Computes for as long as the variable COMPUTE_MICROSECONDS says, for each mail that comes in.
 */
#define _POSIX_C_SOURCE 200809L

#include <mailerq.h>
#include <stdlib.h>
#include <time.h>

static long spent(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

MQ_EXPORT int mq_version(void)
{
    return MQ_API_VERSION;
}

MQ_EXPORT bool mq_smtp_in_message(MQ_Context *context, MQ_SmtpConnection *connection,
                                  MQ_Message *message)
{
    const char *wanted = getenv("COMPUTE_MICROSECONDS");
    long end = spent() + (wanted ? atol(wanted) : 0);
    while (spent() < end) {
    }
    return false;
}
