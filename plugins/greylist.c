/*
 *  greylist - refuse the first attempt of an unknown client.
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -pthread -I../include -o greylist.so greylist.c
 *
 *  After a 451 a mail server tries again some minutes later; most programs that send spam do
 *  not. So each triplet (network of the client, envelope, recipient) is refused when first
 *  seen, and accepted on the next attempt.
 *
 *      GREYLIST_DELAY=0            minimum seconds until the next attempt (300 is usual on the
 *                                  open internet, against clients that try twice at once)
 *      GREYLIST_WINDOW=172800      maximum seconds until the next attempt (2 days)
 *      GREYLIST_KEEP=3024000       seconds that a known triplet stays known (35 days)
 *      GREYLIST_SLOTS=65536        number of remembered triplets, 24 bytes each
 *      GREYLIST_LOOPBACK=1         0: clients on this machine are never refused
 *
 *  A client that has logged in is never refused.
 *
 *  The pattern: MQ_Reject, and memory that all workers share. The table has a fixed size, so
 *  a flood of new triplets replaces the oldest ones and takes no memory. The table is lost on
 *  a restart; then each triplet is refused once more. The lock is held for a few dozen
 *  instructions. A callback must not wait for anything longer, because every session of its
 *  worker waits too.
 */
#define _POSIX_C_SOURCE 200809L
#include <mailerq.h>

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define WAYS 8                  /* slots that a triplet may be in */

/** A triplet, by its hash. `id` is 0 in a free slot. */
struct slot
{
    uint64_t id;
    uint64_t seen;              /* seconds; the last time if known, else the first */
    bool known;
};

/** The data of a connection: the hash of the client, and of client and envelope. */
struct session
{
    bool exempt;
    uint64_t client;
    uint64_t sender;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct slot *table;      /* guarded by the mutex, including its slots */
static size_t groups;           /* of WAYS slots each; a power of two */
static uint64_t secret;         /* keeps clients from computing collisions */

static uint64_t delay_seconds, window_seconds, keep_seconds;
static bool loopback_too;

/** Seconds of the monotonic clock. */
static uint64_t now_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec;
}

static uint64_t number_setting(const char *name, uint64_t otherwise, uint64_t limit)
{
    const char *text = getenv(name);
    if (!text || !*text) return otherwise;
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (!errno && !*end && isdigit((unsigned char)*text) && value <= limit) return value;
    char line[128];
    snprintf(line, sizeof line, "%s must be a number up to %llu; using %llu", name,
             (unsigned long long)limit, (unsigned long long)otherwise);
    MQ_Log(MQ_WARN, line);
    return otherwise;
}

/** Add bytes to a hash (FNV-1a). The letters of an address are hashed in lower case. */
static uint64_t hash(uint64_t state, const void *bytes, size_t size, bool address)
{
    const unsigned char *byte = bytes;
    for (size_t i = 0; i < size; i++)
    {
        uint64_t value = address ? (uint64_t)tolower(byte[i]) : byte[i];
        state = (state ^ value) * UINT64_C(0x100000001b3);
    }
    /* Add a byte that no address holds, so that "a" "bc" differs from "ab" "c". */
    state = (state ^ 0xff) * UINT64_C(0x100000001b3);
    /* The low bits select the group: mix in the high ones. */
    return state ^ (state >> 32);
}

MQ_EXPORT int mq_version(void)
{
    return MQ_API_VERSION;
}

MQ_EXPORT void mq_initialize(void)
{
    delay_seconds = number_setting("GREYLIST_DELAY", 0, UINT32_MAX);
    window_seconds = number_setting("GREYLIST_WINDOW", 2 * 86400, UINT32_MAX);
    keep_seconds = number_setting("GREYLIST_KEEP", 35 * 86400, UINT32_MAX);
    loopback_too = number_setting("GREYLIST_LOOPBACK", 1, 1) != 0;
    size_t slots = (size_t)number_setting("GREYLIST_SLOTS", 65536, 1u << 28);
    for (groups = 1; groups * WAYS < slots; groups *= 2) {}

    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    secret = hash(UINT64_C(0xcbf29ce484222325), &now, sizeof now, false);
    FILE *source = fopen("/dev/urandom", "rb");
    if (source)
    {
        uint64_t drawn;
        if (fread(&drawn, sizeof drawn, 1, source) == 1) secret ^= drawn;
        fclose(source);
    }

    table = calloc(groups * WAYS, sizeof *table);
    if (!table) MQ_Log(MQ_CRIT, "no memory for the table: no client is refused");
}

MQ_EXPORT void mq_cleanup(void)
{
    free(table);
    table = NULL;
}

/**
 *  Identify the client of a connection by its network, /24 (IPv4) or /64 (IPv6): the next
 *  attempt may come from another server of the same operator. Behind a proxy this is the client
 *  of the proxy.
 */
static void identify(struct session *session, const char *client)
{
    unsigned char address[16];
    const unsigned char *bytes = NULL;
    size_t network = 0;
    bool loopback = false;
    if (client && inet_pton(AF_INET, client, address) == 1)
    {
        bytes = address;
        network = 3;
        loopback = bytes[0] == 127;
    }
    else if (client && inet_pton(AF_INET6, client, address) == 1)
    {
        struct in6_addr ip;
        memcpy(&ip, address, sizeof ip);
        bool mapped = IN6_IS_ADDR_V4MAPPED(&ip);
        bytes = address + (mapped ? 12 : 0);
        network = mapped ? 3 : 8;
        loopback = mapped ? bytes[0] == 127 : IN6_IS_ADDR_LOOPBACK(&ip);
    }
    session->exempt = loopback && !loopback_too;
    session->client = hash(secret, bytes, network, false);
}

/**
 *  Record a triplet; return whether it may pass now.
 */
static bool pass(uint64_t id)
{
    uint64_t now = now_seconds();
    bool result = false;
    pthread_mutex_lock(&mutex);
    struct slot *group = table + (id & (groups - 1)) * WAYS;
    struct slot *slot = NULL, *victim = group;
    for (struct slot *next = group; next < group + WAYS; next++)
    {
        if (next->id == id) slot = next;
        /* Replace unknown triplets before known ones, and the oldest first. */
        bool older = next->known == victim->known ? next->seen < victim->seen : !next->known;
        if (next->id == 0 || (victim->id != 0 && older)) victim = next;
    }
    uint64_t age = slot ? now - slot->seen : 0;
    if (!slot || age > (slot->known ? keep_seconds : window_seconds))
    {
        if (!slot) slot = victim;
        *slot = (struct slot){.id = id, .seen = now, .known = false};
    }
    else if (slot->known || age >= delay_seconds)
    {
        slot->known = true;
        slot->seen = now;
        result = true;
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

MQ_EXPORT bool mq_smtp_in_connect(MQ_Context *context, MQ_SmtpConnection *connection)
{
    (void)context;
    struct session *session = calloc(1, sizeof *session);
    if (session) identify(session, MQ_ClientAddress(connection, NULL));
    MQ_SetSmtpData(connection, session);
    return false;
}

MQ_EXPORT bool mq_smtp_in_mailfrom(MQ_Context *context, MQ_SmtpConnection *connection,
                                   const char *mailfrom, size_t size)
{
    (void)context;
    struct session *session = MQ_SmtpData(connection);
    if (session) session->sender = hash(session->client, mailfrom, size, true);
    return false;
}

MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{
    (void)context;
    const struct session *session = MQ_SmtpData(connection);
    if (!table || !session || session->exempt) return false;
    if (MQ_SmtpAuthenticated(connection)) return false;
    uint64_t id = hash(session->sender, rcptto, size, true);
    if (pass(id ? id : 1)) return false;
    /* The reply to this RCPT. Other recipients of the mail are not affected. */
    MQ_Reject(connection, 451, "4.7.1 Greylisted, please try again later");
    return false;
}

MQ_EXPORT bool mq_smtp_in_close(MQ_Context *context, MQ_SmtpConnection *connection)
{
    (void)context;
    free(MQ_SmtpData(connection));
    MQ_SetSmtpData(connection, NULL);
    return false;
}
