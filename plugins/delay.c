/*
 *  delay - delay the reply to each recipient of clients without a login.
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -I../include -o delay.so delay.c
 *
 *  A mail server waits. A program that sends spam to a million addresses often hangs up. A
 *  client that has logged in is not delayed.
 *
 *      DELAY_SECONDS=1.0       the delay, at most 60 (clients time out after some minutes)
 *
 *  The pattern: take control of an event, and hand it back from a timer. The callback returns
 *  true to take the event. Then only this session waits, and the worker goes on with all
 *  others, so a plugin can wait without blocking. Later the plugin calls MQ_Continue,
 *  MQ_Complete or MQ_Retry, exactly once, with the context that it received. The context
 *  identifies this one event, so it is the only data that the timer needs, however many
 *  events wait.
 */
#define _POSIX_C_SOURCE 200809L
#include <mailerq.h>

#include <stdlib.h>

#define LONGEST_SECONDS 60

static float seconds = 1.0f;

MQ_EXPORT int mq_version(void)
{
    return MQ_API_VERSION;
}

MQ_EXPORT void mq_initialize(void)
{
    const char *setting = getenv("DELAY_SECONDS");
    if (!setting || !*setting) return;
    char *end;
    double value = strtod(setting, &end);
    if (!*end && value >= 0 && value <= LONGEST_SECONDS) seconds = (float)value;
    else MQ_Log(MQ_WARN, "DELAY_SECONDS must be a number from 0 to 60; using 1.0");
}

/** Called on the worker of the session. The timer ends with this call. */
static void on_time(void *data)
{
    MQ_Context *context = data;
    MQ_Continue(context);
}

MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{
    (void)rcptto;
    (void)size;
    if (seconds <= 0 || MQ_SmtpAuthenticated(connection)) return false;
    /* Do not take the event without a timer: nothing would hand it back. */
    if (!MQ_TimerStart(context, seconds, on_time, context)) return false;
    /*
     *  The client may hang up in the meantime. That needs no care here: mq_smtp_in_close is
     *  called only after this event has been handed back.
     */
    return true;
}
