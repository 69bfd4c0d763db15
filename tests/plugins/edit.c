/*
 *  A plugin that edits messages. The test says what to do, in words that are carried out one after
 *  the other in each message event:
 *
 *      json                 ask for the JSON and leave it
 *      set NAME VALUE       put a JSON value into a property
 *      number NAME          put a json-c integer beyond 64 bits' worth of sign: 2^64 - 1
 *      nan NAME             put a value that JSON does not have
 *      latin NAME           put a string that is not UTF-8
 *      del NAME
 *      envelope TEXT, recipient TEXT, mime TEXT     the setters; "null" unsets
 *      bytes                MQ_SetMime with a NUL and a byte that is not UTF-8
 *      local                MQ_SetLocal(true)
 *      show                 log what the getters say
 *      dump                 log the JSON
 *      reject
 *      suspend              return true, and go on with the words after it from a timer
 */
#include <json-c/json.h>
#include <mailerq.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char words[1000];

struct job {
    MQ_Context *context;
    MQ_SmtpConnection *connection;
    MQ_Message *message;
    char words[1000];
    char *next;
};

MQ_EXPORT void script(const char *text) { snprintf(words, sizeof words, "%s", text); }

MQ_EXPORT int mq_version() { return MQ_API_VERSION; }

static const char *word(struct job *job)
{
    char *start = job->next + strspn(job->next, " ");
    char *end = start + strcspn(start, " ");
    if (*end) *end++ = 0;
    job->next = end;
    return start;
}

static void say(const char *form, const char *text)
{
    char line[3000];
    snprintf(line, sizeof line, form, text ? text : "NULL");
    MQ_Log(MQ_INFO, line);
}

static bool work(struct job *job)
{
    static const char odd[] = "odd\0body\xff\r\n";
    const char *what, *name;
    for (;;) {
        what = word(job);
        if (!*what) return false;
        if (!strcmp(what, "suspend")) return true;
        if (!strcmp(what, "json")) {
            if (!MQ_Json(job->message) || MQ_Json(job->message) != MQ_Json(job->message)) abort();
        } else if (!strcmp(what, "set")) {
            name = word(job);
            json_object_object_add(MQ_Json(job->message), name, json_tokener_parse(word(job)));
        } else if (!strcmp(what, "number")) {
            json_object_object_add(MQ_Json(job->message), word(job),
                                   json_object_new_uint64(18446744073709551615u));
        } else if (!strcmp(what, "nan")) {
            json_object_object_add(MQ_Json(job->message), word(job), json_object_new_double(0.0 / 0.0));
        } else if (!strcmp(what, "latin")) {
            json_object_object_add(MQ_Json(job->message), word(job), json_object_new_string("\xe9"));
        } else if (!strcmp(what, "del")) {
            json_object_object_del(MQ_Json(job->message), word(job));
        } else if (!strcmp(what, "envelope")) {
            name = word(job);
            MQ_SetEnvelope(job->message, strcmp(name, "null") ? name : NULL, strlen(name));
        } else if (!strcmp(what, "recipient")) {
            name = word(job);
            MQ_SetRecipient(job->message, strcmp(name, "null") ? name : NULL, strlen(name));
        } else if (!strcmp(what, "mime")) {
            name = word(job);
            MQ_SetMime(job->message, strcmp(name, "null") ? name : NULL, strlen(name));
        } else if (!strcmp(what, "bytes")) {
            MQ_SetMime(job->message, odd, sizeof odd - 1);
        } else if (!strcmp(what, "local")) {
            MQ_SetLocal(job->message, true);
            say("local %s", MQ_Local(job->message) ? "yes" : "no");
        } else if (!strcmp(what, "show")) {
            say("envelope %s", MQ_Envelope(job->message));
            say("recipient %s", MQ_Recipient(job->message));
            say("mime %s", MQ_Mime(job->message));
        } else if (!strcmp(what, "dump")) {
            say("%s", json_object_to_json_string_ext(MQ_Json(job->message), JSON_C_TO_STRING_PLAIN |
                                                     JSON_C_TO_STRING_NOSLASHESCAPE));
        } else if (!strcmp(what, "reject")) {
            MQ_Reject(job->connection, 450, "4.2.0 Later");
        } else {
            abort();
        }
    }
}

static void resumed(void *data)
{
    struct job *job = data;
    if (work(job)) abort();
    MQ_Continue(job->context);
    free(job);
}

static bool edit(MQ_Context *context, MQ_SmtpConnection *connection, MQ_Message *message)
{
    struct job *job = calloc(1, sizeof *job);
    job->context = context;
    job->connection = connection;
    job->message = message;
    memcpy(job->words, words, sizeof words);
    job->next = job->words;
    if (!work(job)) {
        free(job);
        return false;
    }
    MQ_TimerStart(context, 0, resumed, job);
    return true;
}

MQ_EXPORT bool mq_smtp_in_message(MQ_Context *context, MQ_SmtpConnection *connection,
                                  MQ_Message *message)
{
    return edit(context, connection, message);
}

MQ_EXPORT bool mq_smtp_out_data(MQ_Context *context, MQ_SmtpConnection *connection,
                                MQ_Message *message)
{
    return edit(context, connection, message);
}

MQ_EXPORT bool mq_smtp_out_sent(MQ_Context *context, MQ_SmtpConnection *connection,
                                MQ_Message *message)
{
    return edit(context, connection, message);
}
