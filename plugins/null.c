/*
 *  null - the smallest plugin, which does nothing.
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -I../include -o null.so null.c
 *
 *  The pattern: a plugin exports functions with names that mailerq knows, and mailerq calls
 *  them. Only mq_version is required. It returns the version of the interface that the plugin
 *  was compiled for. mailerq does not start with a plugin of an unknown version, because it
 *  could not call the plugin safely.
 *
 *  With -fvisibility=hidden only the functions marked MQ_EXPORT are visible outside the
 *  plugin, so two plugins may both have a function called "parse".
 */
#include <mailerq.h>

MQ_EXPORT int mq_version(void)
{
    return MQ_API_VERSION;
}
