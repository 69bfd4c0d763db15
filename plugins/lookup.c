/*
 *  lookup - ask a policy server about each recipient.
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -I../include -o lookup.so lookup.c
 *
 *  The plugin uses the policy delegation protocol of Postfix, which greylisting daemons and
 *  rate limiters support: lines "name=value" and an empty line, answered by "action=..." and
 *  an empty line. These answers have an effect:
 *
 *      DUNNO, and any other answer                 call the next plugin
 *      OK, PERMIT                                  skip the other plugins
 *      REJECT text                                 554 5.7.1 text
 *      DEFER text, DEFER_IF_PERMIT text            451 4.7.1 text
 *      4xx text, 5xx text                          that reply
 *
 *      LOOKUP_SERVER=127.0.0.1:10031   address:port, [IPv6 address]:port or /path/of/socket
 *      LOOKUP_TIMEOUT=5                seconds for the whole query
 *      LOOKUP_FALLBACK=451             without an answer, 451 refuses the recipient for now,
 *                                      and 0 accepts it
 *
 *  The pattern: talk to a server without blocking. The socket is non-blocking, a watcher
 *  reports when it is ready, and a timer limits the whole query. One struct holds the state
 *  of a query and is passed to the callbacks. Whatever happens, `finish` runs exactly once:
 *  it ends the watcher, the timer and the socket, and hands the event back. The server is
 *  given by address, because a name look-up would block the worker.
 *
 *  Each query opens a connection, which is cheap for a server nearby. For a distant server,
 *  keep connections in MQ_SetContextData, where they need no lock.
 */
#define _POSIX_C_SOURCE 200809L
#include <mailerq.h>

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

#define ADDRESS_SIZE 512        /* an SMTP address is shorter: 254 bytes (RFC 5321, 4.5.3.1.3) */
#define REQUEST_SIZE 2048
#define ANSWER_SIZE 2048        /* a longer answer is an error */

/** The data of a connection. */
struct session
{
    char client[INET6_ADDRSTRLEN];
    char sender[ADDRESS_SIZE];
};

/** One running query. */
struct query
{
    MQ_Context *context;
    MQ_SmtpConnection *connection;
    int fd;
    MQ_IOWatcher *watcher;
    MQ_Timer *timer;
    char request[REQUEST_SIZE];
    size_t request_size, sent;
    char answer[ANSWER_SIZE];
    size_t answer_size;
};

static struct sockaddr_storage server;
static socklen_t server_size;
static float timeout_seconds = 5.0f;
static int fallback = 451;

MQ_EXPORT int mq_version(void)
{
    return MQ_API_VERSION;
}

/**
 *  Read "address:port", "[address]:port" or "/path" into `server`.
 */
static bool parse_server(const char *text)
{
    memset(&server, 0, sizeof server);
    if (*text == '/')
    {
        struct sockaddr_un *local = (struct sockaddr_un *)&server;
        if (strlen(text) >= sizeof local->sun_path) return false;
        local->sun_family = AF_UNIX;
        strcpy(local->sun_path, text);
        server_size = sizeof *local;
        return true;
    }
    const char *colon = strrchr(text, ':');
    char host[INET6_ADDRSTRLEN + 2];
    if (!colon || (size_t)(colon - text) >= sizeof host) return false;
    memcpy(host, text, (size_t)(colon - text));
    host[colon - text] = '\0';
    char *address = host;
    if (*address == '[' && address[strlen(address) - 1] == ']')
    {
        address[strlen(address) - 1] = '\0';
        address++;
    }
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV};
    struct addrinfo *found;
    if (getaddrinfo(address, colon + 1, &hints, &found) != 0) return false;
    memcpy(&server, found->ai_addr, found->ai_addrlen);
    server_size = found->ai_addrlen;
    freeaddrinfo(found);
    return true;
}

MQ_EXPORT void mq_initialize(void)
{
    const char *setting = getenv("LOOKUP_SERVER");
    if (!parse_server(setting ? setting : "127.0.0.1:10031"))
    {
        MQ_Log(MQ_CRIT, "LOOKUP_SERVER must be address:port or /path; no server is asked");
        server_size = 0;
    }
    setting = getenv("LOOKUP_TIMEOUT");
    double seconds = setting ? atof(setting) : 0;
    if (seconds > 0) timeout_seconds = (float)seconds;
    setting = getenv("LOOKUP_FALLBACK");
    if (setting) fallback = strcmp(setting, "0") == 0 ? 0 : 451;
}

/**
 *  Apply an action of the server. The caller hands the event back, with MQ_Complete if this
 *  returns true, else with MQ_Continue.
 */
static bool act(MQ_SmtpConnection *connection, const char *action)
{
    const char *text = action + strcspn(action, " \t");
    size_t size = (size_t)(text - action);
    text += strspn(text, " \t");
    bool is_code = size == 3 && strspn(action, "0123456789") >= 3;
    if (is_code && (*action == '4' || *action == '5'))
    {
        MQ_Reject(connection, atoi(action), text);
        return true;
    }
    char word[32];
    snprintf(word, sizeof word, "%.*s", (int)size, action);
    if (strcasecmp(word, "OK") == 0 || strcasecmp(word, "PERMIT") == 0) return true;
    char reply[ANSWER_SIZE];
    if (strcasecmp(word, "REJECT") == 0)
    {
        snprintf(reply, sizeof reply, "5.7.1 %.1000s", *text ? text : "Access denied");
        MQ_Reject(connection, 554, reply);
        return true;
    }
    if (strcasecmp(word, "DEFER") == 0 || strcasecmp(word, "DEFER_IF_PERMIT") == 0)
    {
        snprintf(reply, sizeof reply, "4.7.1 %.1000s", *text ? text : "Try again later");
        MQ_Reject(connection, 451, reply);
        return true;
    }
    return false;
}

/**
 *  End a query with the action of the server, or with the reason for a missing action.
 */
static void finish(struct query *query, const char *action, const char *reason)
{
    if (query->watcher) MQ_IOUnwatch(query->watcher);
    if (query->timer) MQ_TimerStop(query->timer);
    if (query->fd >= 0) close(query->fd);
    bool decided = false;
    if (action)
    {
        decided = act(query->connection, action);
    }
    else
    {
        char line[256];
        snprintf(line, sizeof line, "no answer from the policy server: %s", reason);
        MQ_Log(MQ_WARN, line);
        if (fallback)
        {
            MQ_Reject(query->connection, fallback, "4.3.5 Policy lookup failed, try again later");
            decided = true;
        }
    }
    MQ_Context *context = query->context;
    free(query);
    /* Hand back last: afterwards the event no longer belongs to the plugin. */
    if (decided) MQ_Complete(context);
    else MQ_Continue(context);
}

/**
 *  Find the action of a complete answer; NULL if the answer is incomplete. Lines may end in
 *  LF or CRLF.
 */
static char *find_action(struct query *query)
{
    query->answer[query->answer_size] = '\0';
    char *action = NULL;
    char *line = query->answer;
    for (char *end; (end = strchr(line, '\n')); line = end + 1)
    {
        size_t size = (size_t)(end - line);
        if (size && line[size - 1] == '\r') size--;
        if (size == 0) return action;
        if (size > 7 && strncasecmp(line, "action=", 7) == 0)
        {
            line[size] = '\0';
            action = line + 7;
        }
    }
    return NULL;
}

/** The socket is readable. */
static void on_readable(MQ_IOWatcher *watcher, int fd, int events, void *data)
{
    (void)watcher;
    (void)events;
    struct query *query = data;
    size_t room = sizeof query->answer - 1 - query->answer_size;
    ssize_t size = recv(fd, query->answer + query->answer_size, room, 0);
    if (size < 0)
    {
        if (errno != EAGAIN && errno != EINTR) finish(query, NULL, strerror(errno));
        return;
    }
    query->answer_size += (size_t)size;
    char *action = find_action(query);
    if (action) finish(query, action, NULL);
    else if (size == 0) finish(query, NULL, "it closed the connection");
    else if ((size_t)size == room) finish(query, NULL, "it talks too much");
}

/** The socket has connected, has failed to connect, or has room for more of the request. */
static void on_writable(MQ_IOWatcher *watcher, int fd, int events, void *data)
{
    (void)events;
    struct query *query = data;
    while (query->sent < query->request_size)
    {
        /* After a failed connect, send returns the error of the connect. */
        ssize_t size = send(fd, query->request + query->sent, query->request_size - query->sent,
                            MSG_NOSIGNAL);
        if (size < 0)
        {
            if (errno != EAGAIN && errno != EINTR) finish(query, NULL, strerror(errno));
            return;
        }
        query->sent += (size_t)size;
    }
    MQ_IOUnwatch(watcher);
    query->watcher = MQ_IOWatch(query->context, fd, MQ_READ, on_readable, query);
    if (!query->watcher) finish(query, NULL, "cannot watch the socket");
}

static void on_timeout(void *data)
{
    struct query *query = data;
    query->timer = NULL;        /* a timer ends with its callback */
    finish(query, NULL, "timeout");
}

static int open_socket(void)
{
    int fd = socket(server.ss_family, SOCK_STREAM, 0);
    if (fd < 0) return -1;
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    if (connect(fd, (struct sockaddr *)&server, server_size) == 0) return fd;
    if (errno == EINPROGRESS) return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

/** Copy a string without control characters, which could end a line of the request. */
static void copy(char *target, size_t room, const char *source, size_t size)
{
    size_t used = 0;
    for (size_t i = 0; i < size && used + 1 < room; i++)
    {
        if (!iscntrl((unsigned char)source[i])) target[used++] = source[i];
    }
    target[used] = '\0';
}

MQ_EXPORT bool mq_smtp_in_connect(MQ_Context *context, MQ_SmtpConnection *connection)
{
    (void)context;
    struct session *session = calloc(1, sizeof *session);
    MQ_SetSmtpData(connection, session);
    if (!session) return false;
    const char *client = MQ_ClientAddress(connection, NULL);  /* behind a proxy, its client */
    snprintf(session->client, sizeof session->client, "%s", client ? client : "unknown");
    return false;
}

MQ_EXPORT bool mq_smtp_in_mailfrom(MQ_Context *context, MQ_SmtpConnection *connection,
                                   const char *mailfrom, size_t size)
{
    (void)context;
    struct session *session = MQ_SmtpData(connection);
    if (session) copy(session->sender, sizeof session->sender, mailfrom, size);
    return false;
}

MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{
    const struct session *session = MQ_SmtpData(connection);
    if (!session || !server_size) return false;
    struct query *query = calloc(1, sizeof *query);
    if (!query) return false;
    query->context = context;
    query->connection = connection;

    char recipient[ADDRESS_SIZE];
    copy(recipient, sizeof recipient, rcptto, size);
    query->request_size = (size_t)snprintf(
        query->request, sizeof query->request,
        "request=smtpd_access_policy\nprotocol_state=RCPT\nprotocol_name=ESMTP\n"
        "client_address=%s\nclient_name=unknown\nreverse_client_name=unknown\n"
        "sender=%s\nrecipient=%s\nrecipient_count=0\nsize=0\nencryption_protocol=%s\n\n",
        session->client, session->sender, recipient, MQ_SmtpSecure(connection) ? "TLS" : "");

    /*
     *  From here on the event is taken. `finish` may run before this function returns:
     *  MQ_Continue does not call the next plugin itself, so there is no recursion.
     */
    query->fd = open_socket();
    if (query->fd < 0)
    {
        finish(query, NULL, strerror(errno));
        return true;
    }
    query->timer = MQ_TimerStart(context, timeout_seconds, on_timeout, query);
    query->watcher = MQ_IOWatch(context, query->fd, MQ_WRITE, on_writable, query);
    if (!query->timer || !query->watcher) finish(query, NULL, "no timer or no watcher");
    return true;
}

MQ_EXPORT bool mq_smtp_in_close(MQ_Context *context, MQ_SmtpConnection *connection)
{
    (void)context;
    /* No query is running: this event comes after all others were handed back. */
    free(MQ_SmtpData(connection));
    MQ_SetSmtpData(connection, NULL);
    return false;
}
