/*
 *  A plugin that does as it is told. The test gives it a script, one word for each call:
 *
 *      f     return false
 *      HD    return true and hand back: how, then the decision. How: n before returning, t from a
 *            timer, w from a watcher, e from a libev timer, p from a thread of its own (which may
 *            come before or after the return), k keep it until `release` is called. The decision:
 *            c continue, x complete, r retry.
 *
 *  and "!" behind a word rejects with 550 first. Without a word left it returns false. Each call is
 *  logged with the name of its event, so that the log has the order of the calls of all plugins.
 */
#include <ev.h>
#include <mailerq.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static char words[10000];
static const char *next = words;
static MQ_Context *kept[10000];
static size_t keep_count;

MQ_EXPORT void script(const char *text)
{
    snprintf(words, sizeof words, "%s", text);
    next = words;
}

MQ_EXPORT size_t kept_count(void) { return keep_count; }

static void hand_back(MQ_Context *context, char decision)
{
    if (decision == 'c') MQ_Continue(context);
    else if (decision == 'x') MQ_Complete(context);
    else MQ_Retry(context);
}

MQ_EXPORT void *kept_context(size_t index) { return kept[index]; }

MQ_EXPORT void release(char decision)
{
    size_t count = keep_count;
    keep_count = 0;
    for (size_t index = 0; index < count; ++index) hand_back(kept[index], decision);
}

struct later {
    MQ_Context *context;
    char decision;
    struct ev_timer timer;
};

static struct later *later(MQ_Context *context, char decision)
{
    struct later *later = calloc(1, sizeof *later);
    later->context = context;
    later->decision = decision;
    return later;
}

static void finish(void *data)
{
    struct later *later = data;
    hand_back(later->context, later->decision);
    free(later);
}

static void ready(MQ_IOWatcher *watcher, int fd, int events, void *data)
{
    (void)events;
    MQ_IOUnwatch(watcher);
    close(fd);
    finish(data);
}

static void raw_due(struct ev_loop *loop, struct ev_timer *timer, int events)
{
    (void)loop;
    (void)events;
    finish(timer->data);
}

static void *thread(void *data)
{
    finish(data);
    return NULL;
}

static bool act(MQ_Context *context, MQ_SmtpConnection *connection, const char *event)
{
    pthread_t id;
    char word[4];
    int size = 0;
    MQ_Log(MQ_INFO, event);
    if (sscanf(next, " %3s%n", word, &size) < 1) return false;
    next += size;
    if (connection && strchr(word, '!')) MQ_Reject(connection, 550, "5.7.1 Told to");
    switch (word[0]) {
    case 'f':
        return false;
    case 'n':
        hand_back(context, word[1]);
        break;
    case 't':
        MQ_TimerStart(context, 0.0f, finish, later(context, word[1]));
        break;
    case 'w':
        MQ_IOWatch(context, eventfd(1, 0), MQ_READ, ready, later(context, word[1]));
        break;
    case 'e': {
        struct later *request = later(context, word[1]);
        ev_timer_init(&request->timer, raw_due, 0.001, 0.0);
        request->timer.data = request;
        ev_timer_start(MQ_ev(context), &request->timer);
        break;
    }
    case 'p':
        pthread_create(&id, NULL, thread, later(context, word[1]));
        pthread_detach(id);
        break;
    case 'k':
        kept[keep_count++] = context;
        break;
    }
    return true;
}

MQ_EXPORT int mq_version() { return MQ_API_VERSION; }
MQ_EXPORT void mq_initialize() { MQ_Log(MQ_INFO, "initialize"); }
MQ_EXPORT void mq_cleanup() { MQ_Log(MQ_INFO, "cleanup"); }
MQ_EXPORT bool mq_context_initialize(MQ_Context *context) { return act(context, NULL, "context_initialize"); }
MQ_EXPORT bool mq_context_cleanup(MQ_Context *context) { return act(context, NULL, "context_cleanup"); }

#define PLAIN(name) \
    MQ_EXPORT bool mq_smtp_in_##name(MQ_Context *context, MQ_SmtpConnection *connection) \
    { return act(context, connection, #name); }
#define TEXT(name) \
    MQ_EXPORT bool mq_smtp_in_##name(MQ_Context *context, MQ_SmtpConnection *connection, \
                                     const char *text, size_t size) \
    { return text[size] == 0 && act(context, connection, #name); }
#define MESSAGE(function, name) \
    MQ_EXPORT bool function(MQ_Context *context, MQ_SmtpConnection *connection, MQ_Message *message) \
    { return MQ_Recipient(message) && act(context, connection, #name); }

PLAIN(connect)
PLAIN(secure)
PLAIN(close)
TEXT(mailfrom)
TEXT(rcptto)
TEXT(data)
MESSAGE(mq_smtp_in_message, message)
MESSAGE(mq_smtp_out_data, out_data)
MESSAGE(mq_smtp_out_sent, out_sent)

MQ_EXPORT bool mq_smtp_in_authenticate(MQ_Context *context, MQ_SmtpConnection *connection,
                                       const char *login, size_t loginsize,
                                       const char *passwd, size_t passwdsize)
{
    return login[loginsize] == 0 && passwd[passwdsize] == 0 &&
        act(context, connection, "authenticate");
}
