/*
 *  A plugin for several workers: burns processor time, logs and sends from threads of its own.
 */
#include <mailerq.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LINES 200

MQ_EXPORT volatile int inside, most_inside;

MQ_EXPORT int mq_version() { return MQ_API_VERSION; }

MQ_EXPORT bool mq_context_initialize(MQ_Context *context)
{
    MQ_SetContextData(context, malloc(1));
    return false;
}

MQ_EXPORT bool mq_context_cleanup(MQ_Context *context)
{
    free(MQ_ContextData(context));
    return false;
}

static void *chatter(void *data)
{
    char line[40];
    int number;
    for (number = 0; number < LINES; ++number) {
        snprintf(line, sizeof line, "line %d", number);
        MQ_Log(MQ_INFO, line);
        if (!MQ_SmtpSend(data, "0123456789", 10)) abort();
    }
    return NULL;
}

static pthread_t threads[4];

MQ_EXPORT void join(void)
{
    int index;
    for (index = 0; index < 4; ++index) pthread_join(threads[index], NULL);
}

static void resume(void *context) { MQ_Continue(context); }

MQ_EXPORT bool mq_smtp_in_connect(MQ_Context *context, MQ_SmtpConnection *connection)
{
    MQ_SetSmtpData(connection, MQ_ContextData(context));
    return false;
}

MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{
    int index;
    (void)size;
    if (!strcmp(rcptto, "meet")) {
        /* Comes back when a second worker is in here too, or after two seconds. */
        struct timespec now, start;
        int count = __atomic_add_fetch(&inside, 1, __ATOMIC_SEQ_CST);
        clock_gettime(CLOCK_MONOTONIC, &start);
        do {
            if (count > most_inside) most_inside = count;
            count = inside;
            clock_gettime(CLOCK_MONOTONIC, &now);
        } while (most_inside < 2 && now.tv_sec - start.tv_sec < 2);
    }
    if (!strcmp(rcptto, "chatter"))
        for (index = 0; index < 4; ++index)
            pthread_create(&threads[index], NULL, chatter, connection);
    if (!strncmp(rcptto, "send", 4)) MQ_SmtpSend(connection, "220-hello\r\n", 11);
    if (!strcmp(rcptto, "send and wait")) {
        MQ_TimerStart(context, 0.05f, resume, context);
        return true;
    }
    if (!strcmp(rcptto, "same data") && MQ_SmtpData(connection) != MQ_ContextData(context)) abort();
    if (!strcmp(rcptto, "priorities")) {
        MQ_Log(MQ_CRIT, "critical");
        MQ_Log(MQ_WARN, "warning");
        MQ_Log(99, "other");
        MQ_Log(MQ_INFO, "a\r\nb\033[1m\xc3\xa9\xff\xe2\x80\xa8");
        MQ_Log(MQ_INFO, NULL);
    }
    if (!strcmp(rcptto, "long")) {
        char *text = malloc(100001);
        memset(text, 'x', 100000);
        text[100000] = 0;
        MQ_Log(MQ_INFO, text);
        free(text);
    }
    if (!strcmp(rcptto, "flood"))
        for (index = 0; index < 20000; ++index) MQ_Log(MQ_INFO, "flood");
    return false;
}

MQ_EXPORT bool mq_smtp_in_close(MQ_Context *context, MQ_SmtpConnection *connection)
{
    if (MQ_SmtpSend(connection, "x", 1) != 0) abort();
    if (MQ_SmtpFileDescriptor(connection) != -1) abort();
    (void)context;
    return false;
}
