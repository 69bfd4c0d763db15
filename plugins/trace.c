/*
 *  trace - log every event with its arguments.
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -I../include -o trace.so trace.c
 *
 *  The pattern: the order of calls. Load the plugin, send a mail, and read in the application
 *  log which function is called when, on which worker and on which connection. The plugin
 *  changes nothing: every function returns false. To write a plugin, start with a copy of
 *  this file.
 *
 *      TRACE_QUIET=1       log only start and stop, no mail
 *
 *  The plugin also shows data for each worker and for each connection. A worker is a thread,
 *  and all events of a connection happen on the thread of its worker, so neither needs a
 *  lock. The number of the next worker does, because all workers start at once.
 */
#define _POSIX_C_SOURCE 200809L
#include <mailerq.h>

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LINE_SIZE 1024          /* of a log line; longer lines are cut */
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
 *  Log one line. It may contain text of the client: MQ_Log escapes control characters, so a
 *  client cannot forge log lines.
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
 *  Log one line about a connection, starting with the numbers of worker and connection. The
 *  data may be missing if memory ran out, and an outgoing connection has none.
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
 *  The size to print with "%.*s". Strings come with their size, because they may hold any
 *  byte; printf stops at the first NUL.
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
 *  Start and stop of the process. mq_initialize runs after all plugins were loaded and before
 *  any worker exists; mq_cleanup runs after the last worker ended. Neither needs a lock.
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
 *  Start and stop of a worker, on its thread. MQ_ContextData returns the data that was set
 *  with MQ_SetContextData, for every context of the worker. The plugin must free the data.
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
 *  Incoming mail, in the order of events. Between connect and close there may be any number
 *  of transactions. Each has one mailfrom, one rcptto for each recipient, data after the mail
 *  was received, and then message for each accepted recipient.
 */

MQ_EXPORT bool mq_smtp_in_connect(MQ_Context *context, MQ_SmtpConnection *connection)
{
    struct worker *worker = MQ_ContextData(context);
    struct session *session = calloc(1, sizeof *session);
    if (session) session->number = worker ? ++worker->connections : 0;
    MQ_SetSmtpData(connection, session);

    /* Behind a proxy this is the client of the proxy; the socket's peer is the proxy. */
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
    /* Never log a password. */
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
    /* This is the last event of the connection. */
    MQ_SetSmtpData(connection, NULL);
    free(session);
    return false;
}

/*
 *  Outgoing mail, once for each attempt: out_data when the peer waits for the body, out_sent
 *  when the body was sent and the reply has not arrived. The end of an outgoing connection
 *  has no event, so the plugin keeps no data with it.
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
 *  Message ids. A plugin that exports mq_message_id replaces the generator of mailerq. A
 *  trace should not do that by default, so these functions are compiled only with
 *  -DTRACE_MESSAGE_ID; messageid.c is the real example.
 */

#ifdef TRACE_MESSAGE_ID

MQ_EXPORT size_t mq_message_id_size(void)
{
    say("message_id_size");
    return 32;
}

MQ_EXPORT size_t mq_message_id(char *buffer, size_t size)
{
    /* Runs on any thread, and on several at once: even a counter needs the lock. */
    static unsigned long counter;
    pthread_mutex_lock(&mutex);
    unsigned long number = ++counter;
    pthread_mutex_unlock(&mutex);
    /* An id has no NUL, but snprintf writes one. */
    char id[32];
    int length = snprintf(id, sizeof id, "trace%lu", number);
    if (length < 0 || (size_t)length > size) return 0;
    memcpy(buffer, id, (size_t)length);
    say("message_id %s", id);
    return (size_t)length;
}

#endif
