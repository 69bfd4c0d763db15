// A plugin whose every callback throws, and whose timers and watchers do.
#include <mailerq.h>
#include <pthread.h>
#include <stdexcept>
#include <string>

static void due(void *) { throw std::runtime_error("in a timer"); }

static void ready(MQ_IOWatcher *watcher, int, int, void *)
{
    MQ_IOUnwatch(watcher);
    throw 42;
}

struct Noisy {
    ~Noisy() { MQ_Log(MQ_INFO, "unwound"); }
};

MQ_EXPORT int mq_version() { return MQ_API_VERSION; }

MQ_EXPORT bool mq_smtp_in_connect(MQ_Context *, MQ_SmtpConnection *)
{
    Noisy noisy;
    throw std::runtime_error(std::string(1000, 'x'));
}

MQ_EXPORT bool mq_smtp_in_mailfrom(MQ_Context *context, MQ_SmtpConnection *, const char *, size_t)
{
    MQ_Continue(context);
    throw "after the hand-back";
}

MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *, size_t)
{
    MQ_TimerStart(context, 0, due, nullptr);
    MQ_IOWatch(context, MQ_SmtpFileDescriptor(connection), MQ_WRITE, ready, nullptr);
    MQ_TimerStart(context, 0.02f, [](void *data) {
        MQ_Log(MQ_INFO, "still running");
        MQ_Continue(static_cast<MQ_Context *>(data));
    }, context);
    return true;
}

MQ_EXPORT bool mq_smtp_in_message(MQ_Context *, MQ_SmtpConnection *, MQ_Message *message)
{
    MQ_Json(message);
    MQ_SetEnvelope(message, "x@y.test", 8);
    throw std::logic_error("with a message");
}

MQ_EXPORT size_t mq_message_id_size() { return 8; }
MQ_EXPORT size_t mq_message_id(char *, size_t) { throw std::runtime_error("no id"); }
