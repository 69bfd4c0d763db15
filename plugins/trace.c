/*
 *  trace - logs every event, with what it is about.
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -I../include -o trace.so trace.c
 *
 *  The pattern: the order of calls. Load it, send a mail, and read in the application log
 *  what is called when, on which worker and on which connection. It changes nothing: every
 *  function returns false, "go on". To write a plugin, copy this file and delete.
 *
 *      TRACE_QUIET=1       log only what starts and stops, no mail
 *
 *  Also shown here: data of our own for each worker and for each connection. A worker is a
 *  thread, and everything about one connection happens on the thread of its worker. So
 *  neither kind of data needs a lock; only the number of the next worker does, because all
 *  workers start at once.
 */
#define _POSIX_C_SOURCE 200809L
#include <mailerq.h>

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LINE_SIZE 1024          /* of a log line; a longer one is cut */
#define SHOWN_BYTES 256         /* of an address or a login */

struct worker
{
    int number;
    unsigned long connections;
};

struct session
{
    unsigned long number;       /* counted by the worker */
    unsigned messages;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int workers;
static bool quiet;

/**
 *  Log one line. What a client sent can stand in it as it is: MQ_Log escapes control
 *  characters, so that nobody can forge a line of our log.
 */
static void say(const char *format, ...)
{
    char line[LINE_SIZE];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    MQ_Log(MQ_INFO, line);
}

/**
 *  Log one line about a connection, with the numbers of worker and connection in front.
 *  Both data may be missing when memory ran out, and an outgoing connection has none.
 */
static void say_on(MQ_Context *context, MQ_SmtpConnection *connection, const char *format, ...)
{
    if (quiet) return;
    const struct worker *worker = MQ_ContextData(context);
    const struct session *session = MQ_SmtpData(connection);
    char text[LINE_SIZE];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (session) say("%d/%lu %s", worker ? worker->number : 0, session->number, text);
    else say("%d/- %s", worker ? worker->number : 0, text);
}

/**
 *  How much of a string to print with "%.*s". Strings come with their size, because they may
 *  hold any byte; they end in NUL as well, which printf stops at.
 */
static int shown(size_t size)
{
    return size < SHOWN_BYTES ? (int)size : SHOWN_BYTES;
}

static const char *text_or(const char *text, const char *otherwise)
{
    return text ? text : otherwise;
}

/*
 *  Start and stop of the process. mq_initialize runs when all plugins are loaded and no
 *  worker exists yet, mq_cleanup when the last worker has ended: neither needs a lock.
 */

MQ_EXPORT int mq_version(void)
{
    return MQ_API_VERSION;
}

MQ_EXPORT void mq_initialize(void)
{
    const char *setting = getenv("TRACE_QUIET");
    quiet = setting && *setting && strcmp(setting, "0") != 0;
    workers = 0;
    say("initialize");
}

MQ_EXPORT void mq_cleanup(void)
{
    say("cleanup");
}

/*
 *  Start and stop of a worker, on its own thread. Data set with MQ_SetContextData comes back
 *  from MQ_ContextData with every context of this worker; it is ours to free.
 */

MQ_EXPORT bool mq_context_initialize(MQ_Context *context)
{
    struct worker *worker = calloc(1, sizeof *worker);
    if (!worker) return false;
    pthread_mutex_lock(&mutex);
    worker->number = ++workers;
    pthread_mutex_unlock(&mutex);
    MQ_SetContextData(context, worker);
    say("worker %d: context_initialize", worker->number);
    return false;
}

MQ_EXPORT bool mq_context_cleanup(MQ_Context *context)
{
    struct worker *worker = MQ_ContextData(context);
    if (!worker) return false;
    say("worker %d: context_cleanup after %lu connections", worker->number, worker->connections);
    MQ_SetContextData(context, NULL);
    free(worker);
    return false;
}

/*
 *  Incoming mail, in the order in which it happens. Between connect and close there may be
 *  any number of transactions; each has one mailfrom, rcptto for each recipient, data once
 *  the mail is in, and then message for each recipient that was accepted.
 */

MQ_EXPORT bool mq_smtp_in_connect(MQ_Context *context, MQ_SmtpConnection *connection)
{
    struct worker *worker = MQ_ContextData(context);
    struct session *session = calloc(1, sizeof *session);
    if (session) session->number = worker ? ++worker->connections : 0;
    MQ_SetSmtpData(connection, session);

    /* Behind a proxy this is the proxy's client; the descriptor would lead to the proxy. */
    say_on(context, connection, "in_connect from %s port %d%s",
           text_or(MQ_ClientAddress(connection, NULL), "?"), MQ_ClientPort(connection),
           MQ_SmtpSecure(connection) ? ", secure" : "");
    return false;
}

MQ_EXPORT bool mq_smtp_in_secure(MQ_Context *context, MQ_SmtpConnection *connection)
{
    say_on(context, connection, "in_secure %s %s, certificate of %s",
           text_or(MQ_ClientTlsVersion(connection, NULL), "?"),
           text_or(MQ_ClientTlsCipher(connection, NULL), "?"),
           text_or(MQ_ClientTlsName(connection, NULL), "nobody"));
    return false;
}

MQ_EXPORT bool mq_smtp_in_authenticate(MQ_Context *context, MQ_SmtpConnection *connection,
                                       const char *login, size_t loginsize,
                                       const char *passwd, size_t passwdsize)
{
    /* A log is read by more people than may know a password. */
    (void)passwd;
    say_on(context, connection, "in_authenticate login=%.*s, a password of %lu bytes",
           shown(loginsize), login, (unsigned long)passwdsize);
    return false;
}

MQ_EXPORT bool mq_smtp_in_mailfrom(MQ_Context *context, MQ_SmtpConnection *connection,
                                   const char *mailfrom, size_t size)
{
    say_on(context, connection, "in_mailfrom <%.*s> helo=%.256s%s%.256s", shown(size), mailfrom,
           text_or(MQ_ClientHelo(connection, NULL), "?"),
           MQ_SmtpAuthenticated(connection) ? ", authenticated as " : "",
           text_or(MQ_ClientLogin(connection, NULL), ""));
    return false;
}

MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{
    say_on(context, connection, "in_rcptto <%.*s>", shown(size), rcptto);
    return false;
}

MQ_EXPORT bool mq_smtp_in_data(MQ_Context *context, MQ_SmtpConnection *connection,
                               const char *mime, size_t size)
{
    (void)mime;
    say_on(context, connection, "in_data %lu bytes", (unsigned long)size);
    return false;
}

MQ_EXPORT bool mq_smtp_in_message(MQ_Context *context, MQ_SmtpConnection *connection,
                                  MQ_Message *message)
{
    struct session *session = MQ_SmtpData(connection);
    if (session) session->messages++;
    say_on(context, connection, "in_message from <%.256s> to <%.256s>%s",
           text_or(MQ_Envelope(message), ""), text_or(MQ_Recipient(message), ""),
           MQ_Local(message) ? ", local" : "");
    return false;
}

MQ_EXPORT bool mq_smtp_in_close(MQ_Context *context, MQ_SmtpConnection *connection)
{
    struct session *session = MQ_SmtpData(connection);
    say_on(context, connection, "in_close after %u messages", session ? session->messages : 0);
    /* The last time that we see this connection. */
    MQ_SetSmtpData(connection, NULL);
    free(session);
    return false;
}

/*
 *  Outgoing mail, once for every attempt: out_data when the remote server waits for the
 *  body, out_sent when it has the body and has not answered yet. There is no event for the
 *  end of an outgoing connection, so we keep no data with it.
 */

MQ_EXPORT bool mq_smtp_out_data(MQ_Context *context, MQ_SmtpConnection *connection,
                                MQ_Message *message)
{
    say_on(context, connection, "out_data from <%.256s> to <%.256s>, %lu bytes",
           text_or(MQ_Envelope(message), ""), text_or(MQ_Recipient(message), ""),
           (unsigned long)MQ_MimeSize(message));
    return false;
}

MQ_EXPORT bool mq_smtp_out_sent(MQ_Context *context, MQ_SmtpConnection *connection,
                                MQ_Message *message)
{
    say_on(context, connection, "out_sent to <%.256s>", text_or(MQ_Recipient(message), ""));
    return false;
}

/*
 *  Message ids. One plugin owns them, and a plugin that exports mq_message_id takes them
 *  over from mailerq's own generator. That is more than a trace should do unasked, so these
 *  two are compiled only with -DTRACE_MESSAGE_ID; messageid.c is the example for the purpose.
 */

#ifdef TRACE_MESSAGE_ID

MQ_EXPORT size_t mq_message_id_size(void)
{
    say("message_id_size");
    return 32;
}

MQ_EXPORT size_t mq_message_id(char *buffer, size_t size)
{
    /* May run on any thread, and on several at once: even a counter needs the lock. */
    static unsigned long counter;
    pthread_mutex_lock(&mutex);
    unsigned long number = ++counter;
    pthread_mutex_unlock(&mutex);
    /* No NUL belongs to an id, but snprintf wants room for one. */
    char id[32];
    int length = snprintf(id, sizeof id, "trace%lu", number);
    if (length < 0 || (size_t)length > size) return 0;
    memcpy(buffer, id, (size_t)length);
    say("message_id %s", id);
    return (size_t)length;
}

#endif
