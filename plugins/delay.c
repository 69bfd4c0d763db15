/*
 *  delay - lets strangers wait for the answer to each recipient.
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -I../include -o delay.so delay.c
 *
 *  A mail server has time; a program that sends spam to a million addresses has not, and
 *  often hangs up. Who has logged in does not wait.
 *
 *      DELAY_SECONDS=1.0       how long, up to 60 (a client waits some minutes at most)
 *
 *  The pattern: taking control of an event, and giving it back from a timer. The callback
 *  returns true: "this event is mine". From then on this session stands still, and only this
 *  one; the worker goes on with all the others, so a plugin can wait without blocking.
 *  Later, exactly once, the plugin calls MQ_Continue (or MQ_Complete, or MQ_Retry) with the
 *  context that it was given. That pointer belongs to this one event: it is all that a timer
 *  has to carry, however many events wait at the same time.
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
    else MQ_Log(MQ_WARN, "DELAY_SECONDS is no number from 0 to 60, taking 1.0");
}

/** Runs on the worker of the session; the timer is gone after it. */
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
    /* Without a timer nobody would hand the event back: then it is not taken. */
    if (!MQ_TimerStart(context, seconds, on_time, context)) return false;
    /*
     *  The client may hang up while it waits. That needs no care here: mq_smtp_in_close
     *  comes only after this event has been handed back.
     */
    return true;
}
