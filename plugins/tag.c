/*
 *  tag - add facts about the SMTP session to the JSON of each incoming mail.
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -I../include -o tag.so tag.c -ljson-c
 *
 *  Every published message gets
 *
 *      "tags": [..., "smtp"]
 *      "transaction": {"recipients": 3, "size": 2345, "seconds": 0.8}
 *
 *  and keeps them in the queues, in every result, and in the programs that read the queues.
 *  In this way a plugin passes facts to applications: here the number of recipients, the size
 *  of the mail as received, and the time from MAIL to the final dot.
 *
 *      TAG_NAME=smtp               the tag to add; empty: none
 *      TAG_PROPERTY=transaction    the name of the property; empty: none
 *
 *  The pattern: MQ_Json, a live object of the json-c library. mailerq owns the object, and
 *  reads it back after this callback. Values that are added belong to the object. Properties
 *  that mailerq does not know may hold anything. A known property must keep its type, or the
 *  mail is refused and the log names the plugin and the property. So "tags", which an
 *  x-mq-tag header field may have set, is checked before it is changed.
 */
#define _POSIX_C_SOURCE 200809L
#include <mailerq.h>

#include <json-c/json.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/** The data of a connection: its current transaction. */
struct session
{
    struct timespec start;
    int recipients;
    size_t size;
};

static const char *tag;
static const char *property;

static const char *setting(const char *name, const char *otherwise)
{
    const char *value = getenv(name);
    return value ? value : otherwise;
}

static double seconds_since(struct timespec start)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)(now.tv_sec - start.tv_sec) + (double)(now.tv_nsec - start.tv_nsec) / 1e9;
}

MQ_EXPORT int mq_version(void)
{
    return MQ_API_VERSION;
}

MQ_EXPORT void mq_initialize(void)
{
    tag = setting("TAG_NAME", "smtp");
    property = setting("TAG_PROPERTY", "transaction");
}

MQ_EXPORT bool mq_smtp_in_mailfrom(MQ_Context *context, MQ_SmtpConnection *connection,
                                   const char *mailfrom, size_t size)
{
    (void)context;
    (void)mailfrom;
    (void)size;
    struct session *session = MQ_SmtpData(connection);
    if (!session)
    {
        session = malloc(sizeof *session);
        MQ_SetSmtpData(connection, session);
        if (!session) return false;
    }
    /* MAIL starts a new transaction, however the previous one ended. */
    clock_gettime(CLOCK_MONOTONIC, &session->start);
    session->recipients = 0;
    session->size = 0;
    return false;
}

MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{
    (void)context;
    (void)rcptto;
    (void)size;
    struct session *session = MQ_SmtpData(connection);
    if (session) session->recipients++;
    return false;
}

MQ_EXPORT bool mq_smtp_in_data(MQ_Context *context, MQ_SmtpConnection *connection,
                               const char *mime, size_t size)
{
    (void)context;
    (void)mime;
    struct session *session = MQ_SmtpData(connection);
    if (session) session->size = size;
    return false;
}

/** Add the tag to the list of tags, once. */
static void add_tag(struct json_object *json)
{
    struct json_object *tags;
    if (!json_object_object_get_ex(json, "tags", &tags) || !tags)
    {
        tags = json_object_new_array();
        if (!tags || json_object_object_add(json, "tags", tags) != 0) return;
    }
    if (!json_object_is_type(tags, json_type_array)) return;
    for (size_t i = 0; i < json_object_array_length(tags); i++)
    {
        const char *known = json_object_get_string(json_object_array_get_idx(tags, i));
        if (known && strcmp(known, tag) == 0) return;
    }
    json_object_array_add(tags, json_object_new_string(tag));
}

static void add_transaction(struct json_object *json, const struct session *session)
{
    struct json_object *facts = json_object_new_object();
    if (!facts) return;
    json_object_object_add(facts, "recipients", json_object_new_int(session->recipients));
    json_object_object_add(facts, "size", json_object_new_int64((int64_t)session->size));
    json_object_object_add(facts, "seconds", json_object_new_double(seconds_since(session->start)));
    json_object_object_add(json, property, facts);
}

/** Called for each recipient, which has its own JSON object. */
MQ_EXPORT bool mq_smtp_in_message(MQ_Context *context, MQ_SmtpConnection *connection,
                                  MQ_Message *message)
{
    (void)context;
    struct json_object *json = MQ_Json(message);
    const struct session *session = MQ_SmtpData(connection);
    if (json && *tag) add_tag(json);
    if (json && *property && session) add_transaction(json, session);
    return false;
}

MQ_EXPORT bool mq_smtp_in_close(MQ_Context *context, MQ_SmtpConnection *connection)
{
    (void)context;
    free(MQ_SmtpData(connection));
    MQ_SetSmtpData(connection, NULL);
    return false;
}
