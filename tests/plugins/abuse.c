/*
 *  A plugin that does everything wrong. What it does is the address of mq_smtp_in_rcptto.
 */
#include <mailerq.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static MQ_Context *initial, *kept;
static MQ_SmtpConnection *kept_connection;
static MQ_Message *kept_message;
static MQ_Timer *kept_timer;
static MQ_IOWatcher *kept_watcher;

static void nothing(void *data) { (void)data; }

static void no_event(MQ_IOWatcher *watcher, int fd, int events, void *data)
{
    (void)watcher;
    (void)fd;
    (void)events;
    (void)data;
}

/* Every function, with whatever handle: each must come back, and none may do anything. */
static int call_everything(void *handle)
{
    static char text[] = "x";
    size_t size = 1;
    int wrong = 0;
    MQ_Continue(handle);
    MQ_Complete(handle);
    MQ_Retry(handle);
    wrong += MQ_ContextData(handle) != NULL;
    MQ_SetContextData(handle, text);
    wrong += MQ_ev(handle) != NULL;
    wrong += MQ_IOWatch(handle, 0, MQ_READ, no_event, NULL) != NULL;
    MQ_IOUnwatch(handle);
    wrong += MQ_TimerStart(handle, 1, nothing, NULL) != NULL;
    MQ_TimerReset(handle, 1);
    MQ_TimerStop(handle);
    wrong += MQ_SmtpFileDescriptor(handle) != -1;
    wrong += MQ_SmtpSend(handle, text, 1) != 0;
    wrong += MQ_ClientAddress(handle, &size) || MQ_ClientHelo(handle, &size) ||
             MQ_ClientLogin(handle, &size) || MQ_ClientTlsVersion(handle, &size) ||
             MQ_ClientTlsCipher(handle, &size) || MQ_ClientTlsName(handle, NULL) ||
             MQ_ClientPort(handle) || size;
    wrong += MQ_SmtpAuthenticated(handle);
    MQ_SetSmtpAuthenticated(handle, true);
    wrong += MQ_SmtpSecure(handle);
    wrong += MQ_SmtpData(handle) != NULL;
    MQ_SetSmtpData(handle, text);
    MQ_Reject(handle, 550, "no");
    wrong += MQ_Json(handle) != NULL;
    wrong += MQ_Envelope(handle) != NULL;
    wrong += MQ_Recipient(handle) != NULL;
    wrong += MQ_Mime(handle) != NULL;
    wrong += MQ_MimeSize(handle) != 0;
    MQ_SetEnvelope(handle, text, 1);
    MQ_SetRecipient(handle, text, 1);
    MQ_SetMime(handle, text, 1);
    wrong += MQ_Local(handle);
    MQ_SetLocal(handle, true);
    return wrong;
}

static void *thread(void *handle)
{
    return (void *)(intptr_t)call_everything(handle);
}

static int call_on_a_thread(void *handle)
{
    pthread_t id;
    void *wrong = NULL;
    pthread_create(&id, NULL, thread, handle);
    pthread_join(id, &wrong);
    return (int)(intptr_t)wrong;
}

static void say(const char *what, int number)
{
    char text[100];
    snprintf(text, sizeof text, "%s %d", what, number);
    MQ_Log(MQ_INFO, text);
}

MQ_EXPORT int mq_version() { return MQ_API_VERSION; }

MQ_EXPORT bool mq_context_initialize(MQ_Context *context)
{
    initial = context;
    return false;
}

MQ_EXPORT bool mq_smtp_in_message(MQ_Context *context, MQ_SmtpConnection *connection,
                                  MQ_Message *message)
{
    (void)context;
    (void)connection;
    kept_message = message;
    return false;
}

MQ_EXPORT bool mq_smtp_in_connect(MQ_Context *context, MQ_SmtpConnection *connection)
{
    (void)context;
    kept_connection = connection;
    return false;
}

/* For the test: hand back with the context of mq_context_initialize, or with the kept one. */
MQ_EXPORT void continue_initial(void) { MQ_Continue(initial); }
MQ_EXPORT void continue_kept(void) { MQ_Continue(kept); }
MQ_EXPORT size_t send_kept(void) { return MQ_SmtpSend(kept_connection, "x", 1); }

MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{
    (void)size;
    if (!strcmp(rcptto, "keep") || !strcmp(rcptto, "keep and pass")) {
        kept = context;
        return !strcmp(rcptto, "keep");
    }
    if (!strcmp(rcptto, "take")) return true;
    if (!strcmp(rcptto, "twice")) {
        MQ_Continue(context);
        MQ_Continue(context);
        return true;
    }
    if (!strcmp(rcptto, "both")) {
        MQ_Continue(context);
        return false;
    }
    if (!strcmp(rcptto, "stale")) MQ_Continue(kept);
    if (!strcmp(rcptto, "initial")) {
        MQ_Complete(initial);
        return true;
    }
    if (!strcmp(rcptto, "retry")) {
        MQ_Retry(context);
        return true;
    }
    if (!strcmp(rcptto, "garbage")) {
        uintptr_t number;
        int wrong = call_everything(NULL);
        for (number = 1; number; number <<= 1)
            wrong += call_everything((void *)number) + call_everything((void *)~number);
        wrong += call_everything("not a handle at all");
        say("wrong", wrong);
    }
    if (!strcmp(rcptto, "gone")) {
        /* All of these were valid a moment ago. (The context still is, for all but handing back.) */
        say("wrong", call_everything(kept_connection) + call_everything(kept_message) +
                     call_everything(kept_timer) + call_everything(kept_watcher));
    }
    if (!strcmp(rcptto, "make")) {
        kept_timer = MQ_TimerStart(context, 100, nothing, NULL);
        kept_watcher = MQ_IOWatch(context, 0, MQ_WRITE, no_event, NULL);
        MQ_TimerStop(kept_timer);
        MQ_IOUnwatch(kept_watcher);
        say("made", kept_timer && kept_watcher);
    }
    if (!strcmp(rcptto, "thread")) {
        /* Of the three only MQ_SmtpSend works, as it may; a hand-back of this very event does not
         * belong here, so the context is one that is over. */
        say("wrong", call_on_a_thread(connection) + call_on_a_thread(kept));
        say("data", MQ_SmtpData(connection) || MQ_ContextData(context));
    }
    if (!strcmp(rcptto, "fd"))
        say("wrong", MQ_IOWatch(context, -1, MQ_READ, no_event, NULL) ||
                     MQ_IOWatch(context, 100000, MQ_READ, no_event, NULL) ||
                     MQ_IOWatch(context, 0, 0, no_event, NULL) ||
                     MQ_IOWatch(context, 0, MQ_READ, NULL, NULL) ||
                     MQ_TimerStart(context, 1, NULL, NULL));
    if (!strcmp(rcptto, "code")) MQ_Reject(connection, 250, "1.2.3.4\r\nQUIT\r\n\033[1m");
    if (!strcmp(rcptto, "null")) MQ_Reject(connection, 452, NULL);
    return false;
}
