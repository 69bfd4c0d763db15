/*
 *  Does something fatal in the function that FAULT_IN names: what FAULT says.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <ev.h>
#include <mailerq.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static volatile int zero = 0, hundred = 100;

static int overflow(volatile char *before)
{
    volatile char more[4096];
    more[0] = before ? before[0] : 0;
    return overflow(more) + more[0];
}

static void hold_pythons_lock(void)
{
    int (*ensure)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
    if (ensure) ensure();
}

static void touch_a_truncated_file(void)
{
    char name[] = "/tmp/mailerq-fault-XXXXXX", *page;
    int fd = mkstemp(name);
    unlink(name);
    page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    page[0] = 1;
}

static void close_what_the_loops_wait_on(void)
{
    char name[64], target[64];
    for (int fd = 3; fd < 256; ++fd) {
        snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
        ssize_t size = readlink(name, target, sizeof(target) - 1);
        if (size < 0) continue;
        target[size] = 0;
        if (strstr(target, "[eventpoll]")) close(fd);
    }
}

static void wait_for_ever(void) { for (;;) pause(); }

static void fault(const char *function)
{
    const char *where = getenv("FAULT_IN"), *what = getenv("FAULT");
    if (!where || strcmp(where, function)) return;
    if (!strcmp(what, "SIGSEGV")) *(volatile int *)8 = 1;
    if (!strcmp(what, "overflow")) overflow(0);
    if (!strcmp(what, "SIGBUS")) touch_a_truncated_file();
    if (!strcmp(what, "SIGFPE")) zero = hundred / zero;
    if (!strcmp(what, "SIGILL")) __builtin_trap();
    if (!strcmp(what, "SIGABRT")) abort();
    if (!strcmp(what, "exit")) exit(7);
    if (!strcmp(what, "_exit")) _exit(7);
    if (!strcmp(what, "_Exit")) _Exit(7);
    if (!strcmp(what, "quick_exit")) quick_exit(7);
    if (!strcmp(what, "close")) close_what_the_loops_wait_on();
    if (!strcmp(what, "deadlock")) wait_for_ever();
    if (!strcmp(what, "doze")) usleep(700 * 1000);
    if (!strcmp(what, "lock")) { hold_pythons_lock(); wait_for_ever(); }
}

__attribute__((constructor)) static void constructor(void) { fault("constructor"); }

MQ_EXPORT int mq_version(void) { fault("mq_version"); return MQ_API_VERSION; }
MQ_EXPORT void mq_initialize(void) { fault("mq_initialize"); }
MQ_EXPORT void mq_cleanup(void) { fault("mq_cleanup"); }
MQ_EXPORT size_t mq_message_id_size(void) { fault("mq_message_id_size"); return 8; }

MQ_EXPORT size_t mq_message_id(char *buffer, size_t size)
{
    fault("mq_message_id");
    memset(buffer, 'x', size);
    return size;
}

static void due(void *context) { fault("a timer"); MQ_Continue(context); }

static int pair[2] = {-1, -1};

static void readable(MQ_IOWatcher *watcher, int fd, int events, void *context)
{
    (void)fd; (void)events;
    fault("a watcher");
    MQ_IOUnwatch(watcher);
    MQ_Continue(context);
}

static void raw(struct ev_loop *loop, ev_timer *timer, int events)
{
    (void)events;
    fault("a libev callback");
    ev_timer_stop(loop, timer);
    MQ_Continue(timer->data);
}

static void *thread(void *context)
{
    fault("thread");
    MQ_Continue(context);
    return 0;
}

static bool asynchronous(MQ_Context *context)
{
    static ev_timer timer;
    const char *where = getenv("FAULT_IN");
    pthread_t id;
    if (!where) return false;
    if (!strcmp(where, "a timer")) {
        MQ_TimerStart(context, 0, due, context);
    } else if (!strcmp(where, "a watcher")) {
        if (pipe(pair) || write(pair[1], "x", 1) != 1) abort();
        MQ_IOWatch(context, pair[0], MQ_READ, readable, context);
    } else if (!strcmp(where, "a libev callback")) {
        ev_timer_init(&timer, raw, 0, 0);
        timer.data = context;
        ev_timer_start(MQ_ev(context), &timer);
    } else if (!strcmp(where, "thread")) {
        pthread_create(&id, 0, thread, context);
        pthread_detach(id);
    } else {
        return false;
    }
    return true;
}

#define CONTEXT_EVENT(name)                                                                        \
    MQ_EXPORT bool name(MQ_Context *context) { (void)context; fault(#name); return false; }
#define CONNECTION_EVENT(name)                                                                     \
    MQ_EXPORT bool name(MQ_Context *context, MQ_SmtpConnection *connection)                        \
    { (void)context; (void)connection; fault(#name); return false; }
#define TEXT_EVENT(name)                                                                           \
    MQ_EXPORT bool name(MQ_Context *context, MQ_SmtpConnection *connection, const char *text,      \
                        size_t size)                                                               \
    { (void)context; (void)connection; (void)text; (void)size; fault(#name); return false; }
#define MESSAGE_EVENT(name)                                                                        \
    MQ_EXPORT bool name(MQ_Context *context, MQ_SmtpConnection *connection, MQ_Message *message)   \
    { (void)context; (void)connection; (void)message; fault(#name); return false; }

CONTEXT_EVENT(mq_context_initialize)
CONTEXT_EVENT(mq_context_cleanup)
CONNECTION_EVENT(mq_smtp_in_secure)
CONNECTION_EVENT(mq_smtp_in_close)
TEXT_EVENT(mq_smtp_in_mailfrom)
TEXT_EVENT(mq_smtp_in_rcptto)
TEXT_EVENT(mq_smtp_in_data)
MESSAGE_EVENT(mq_smtp_in_message)
MESSAGE_EVENT(mq_smtp_out_data)
MESSAGE_EVENT(mq_smtp_out_sent)

MQ_EXPORT bool mq_smtp_in_connect(MQ_Context *context, MQ_SmtpConnection *connection)
{
    (void)connection;
    fault("mq_smtp_in_connect");
    return asynchronous(context);
}

MQ_EXPORT bool mq_smtp_in_authenticate(MQ_Context *context, MQ_SmtpConnection *connection,
                                       const char *login, size_t loginsize, const char *passwd,
                                       size_t passwdsize)
{
    (void)context; (void)connection; (void)login; (void)loginsize; (void)passwd; (void)passwdsize;
    fault("mq_smtp_in_authenticate");
    return false;
}
