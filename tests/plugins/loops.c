/*
 *  A plugin that works with timers and watchers; the address of mq_smtp_in_rcptto says how. What it
 *  wants to tell it counts, for the test to read.
 */
#include <ev.h>
#include <mailerq.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static MQ_Context *context;
static MQ_Timer *timers[10000];
static MQ_IOWatcher *watchers[1000];
static int pipes[1000][2];
static struct ev_timer raw;
static pthread_t home;
static double started;

MQ_EXPORT int fired, watched, late, elsewhere;
MQ_EXPORT double least = 1e9; /* seconds that the most punctual timer was late by */

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

MQ_EXPORT int mq_version() { return MQ_API_VERSION; }

MQ_EXPORT bool mq_context_initialize(MQ_Context *initial)
{
    context = initial;
    home = pthread_self();
    return false;
}

static void check_thread(void) { elsewhere += !pthread_equal(home, pthread_self()); }

static void count(void *data)
{
    (void)data;
    check_thread();
    ++fired;
}

static void timed(void *data)
{
    double late_by = now() - *(double *)data;
    if (late_by < least) least = late_by;
    if (late_by < 0) ++late;
    free(data);
    count(NULL);
}

static void touch_itself(void *data)
{
    MQ_Timer **timer = data;
    MQ_TimerStop(*timer);
    MQ_TimerReset(*timer, 0.001f);
    MQ_TimerStop(*timer);
    count(NULL);
}

static void again(void *data)
{
    count(NULL);
    if (fired < 100) MQ_TimerStart(context, 0, again, data);
    else MQ_Continue(data);
}

static void hand_back(void *data)
{
    check_thread();
    MQ_Continue(data);
}

static void readable(MQ_IOWatcher *watcher, int fd, int events, void *data)
{
    char byte;
    check_thread();
    if (events == MQ_READ && data == &pipes[0] && read(fd, &byte, 1) == 1) ++watched;
    if (byte == 'q') MQ_IOUnwatch(watcher);
}

static void raw_due(struct ev_loop *loop, struct ev_timer *timer, int events)
{
    (void)events;
    count(NULL);
    if (loop != MQ_ev(context)) ++elsewhere;
    MQ_Continue(timer->data);
}

MQ_EXPORT void write_all(char byte)
{
    int index;
    for (index = 0; index < 1000; ++index)
        if (write(pipes[index][1], &byte, 1) != 1) abort();
}

MQ_EXPORT void unwatch_all(void)
{
    int index;
    for (index = 0; index < 1000; ++index) {
        close(pipes[index][0]);
        close(pipes[index][1]);
    }
}

MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *event, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{
    int index;
    (void)connection;
    (void)size;
    if (!strcmp(rcptto, "many timers")) {
        for (index = 0; index < 10000; ++index) {
            double *due = malloc(sizeof *due);
            *due = now() + 0.001 * (index % 100);
            timers[index] = MQ_TimerStart(event, 0.001f * (index % 100), timed, due);
        }
        MQ_TimerStart(event, 0.12f, hand_back, event);
        return true;
    }
    if (!strcmp(rcptto, "one timer")) {
        double *due = malloc(sizeof *due);
        *due = now() + 0.02;
        MQ_TimerStart(event, 0.02f, timed, due);
        MQ_TimerStart(event, 0.03f, hand_back, event);
        return true;
    }
    if (!strcmp(rcptto, "stop and reset")) {
        MQ_TimerStop(MQ_TimerStart(event, 0.001f, count, NULL));
        MQ_TimerReset(MQ_TimerStart(event, 100, count, NULL), 0.005f);
        timers[0] = MQ_TimerStart(event, 0.002f, touch_itself, &timers[0]);
        MQ_TimerStart(event, -1, count, NULL);
        MQ_TimerStart(event, 0.02f, hand_back, event);
        return true;
    }
    if (!strcmp(rcptto, "old context")) {
        /* The context of an event that is over still names the thread and the plugin. */
        MQ_TimerStart(event, 0, again, event);
        return true;
    }
    if (!strcmp(rcptto, "watch")) {
        for (index = 0; index < 1000; ++index) {
            if (pipe(pipes[index])) abort();
            watchers[index] = MQ_IOWatch(event, pipes[index][0], MQ_READ, readable, &pipes[0]);
        }
    }
    if (!strcmp(rcptto, "unwatch"))
        for (index = 0; index < 1000; ++index) MQ_IOUnwatch(watchers[index]);
    if (!strcmp(rcptto, "raw")) {
        started = ev_now(MQ_ev(event));
        ev_timer_init(&raw, raw_due, 0.005, 0);
        raw.data = event;
        ev_timer_start(MQ_ev(event), &raw);
        return true;
    }
    if (!strcmp(rcptto, "leave")) {
        MQ_TimerStart(event, 1000, count, NULL);
        MQ_IOWatch(event, 0, MQ_READ, readable, NULL);
    }
    return false;
}
