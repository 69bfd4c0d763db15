/*
 *  null - the smallest plugin: it is loaded and does nothing.
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -I../include -o null.so null.c
 *
 *  The pattern: a plugin exports functions with names that mailerq knows, and mailerq calls
 *  those that are there. Only mq_version is required. It tells for which version of the
 *  interface the plugin was compiled; mailerq refuses to start with a plugin of a version
 *  that it does not know, because it could not call it safely.
 *
 *  With -fvisibility=hidden nothing but the functions marked MQ_EXPORT is seen from outside,
 *  so that two plugins may both have a function called "parse".
 */
#include <mailerq.h>

MQ_EXPORT int mq_version(void)
{
    return MQ_API_VERSION;
}
