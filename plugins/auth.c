/*
 *  auth - check logins against a file of password hashes.
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -pthread -I../include -o auth.so auth.c -lcrypt
 *
 *  Each line of the file is "login:hash", with a hash of crypt(3). Further fields after a
 *  second colon, empty lines, and lines that start with # are ignored. To add a login:
 *
 *      echo "ann:$(openssl passwd -6)" >> /etc/mailerq/passwd
 *
 *      AUTH_FILE=/etc/mailerq/passwd       read for every login, so changes apply at once
 *      AUTH_THREADS=2                      number of threads that compute hashes
 *
 *  Logins that are not in the file are left to other plugins and to the configuration.
 *
 *  The pattern: slow work on threads of the plugin. A good password hash takes a tenth of a
 *  second on purpose, and reading a file may be slow too. On the worker, both would hold up
 *  every session. So the callback queues a job and returns true, and a thread runs the job.
 *  A thread may call only MQ_Continue, MQ_Complete, MQ_Retry, MQ_SmtpSend and MQ_Log, not
 *  MQ_SetSmtpAuthenticated. So the thread stores its verdict in the job and calls MQ_Retry.
 *  The callback then runs again on the worker, finds the verdict and answers.
 *
 *  The connection and the thread hold a job; `holders` counts them, and the last one frees
 *  the job. So the thread is safe when the event is given up (plugin-timeout) and the
 *  connection ends.
 */
#define _GNU_SOURCE             /* crypt_r, explicit_bzero */
#include <mailerq.h>

#include <crypt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LONGEST_QUEUE 1000      /* jobs; when the queue is full, logins get 454 */
#define MOST_THREADS 64
#define LINE_SIZE 1024

enum verdict { RUNNING, ACCEPTED, REFUSED, UNKNOWN, FAILED };

/** The check of one login. Only the last part changes after the job was queued. */
struct job
{
    MQ_Context *context;
    char *login, *password;     /* copies, because the thread may outlive the event */
    size_t login_size, password_size;

    struct job *next;           /* from here on guarded by the mutex */
    int holders;
    enum verdict verdict;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER;
static struct job *first, **last = &first;
static int queued;
static bool stopping;

static pthread_t threads[MOST_THREADS];
static int thread_count;
static const char *path;

/** A salt for unknown logins, so that they take as long as known ones. */
static const char nobody[] = "$6$mailerq.nobody$";

static char *copy(const char *bytes, size_t size)
{
    char *result = malloc(size + 1);
    if (!result) return NULL;
    memcpy(result, bytes, size);
    result[size] = '\0';
    return result;
}

static void free_job(struct job *job)
{
    if (job->password) explicit_bzero(job->password, job->password_size);
    free(job->login);
    free(job->password);
    free(job);
}

/** Release one hold on a job. */
static void release(struct job *job)
{
    pthread_mutex_lock(&mutex);
    bool free_it = --job->holders == 0;
    pthread_mutex_unlock(&mutex);
    if (free_it) free_job(job);
}

/**
 *  Find the hash of a login. Returns FAILED if the file cannot be read, UNKNOWN if the login
 *  is not in the file, otherwise RUNNING with the hash in `hash`.
 */
static enum verdict find_hash(const char *login, char *hash, size_t size)
{
    FILE *file = fopen(path, "re");
    if (!file) return FAILED;
    char line[LINE_SIZE];
    enum verdict result = UNKNOWN;
    size_t login_size = strlen(login);
    while (result == UNKNOWN && fgets(line, sizeof line, file))
    {
        char *value = line + login_size + 1;
        if (*line == '#' || strncmp(line, login, login_size) != 0 || value[-1] != ':') continue;
        value[strcspn(value, ":\r\n")] = '\0';
        snprintf(hash, size, "%s", value);
        result = RUNNING;
    }
    if (ferror(file)) result = FAILED;
    fclose(file);
    explicit_bzero(line, sizeof line);
    return result;
}

/** Compare in constant time. */
static bool equal(const char *a, const char *b)
{
    size_t size = strlen(a);
    if (size != strlen(b)) return false;
    unsigned char difference = 0;
    for (size_t i = 0; i < size; i++) difference |= (unsigned char)(a[i] ^ b[i]);
    return difference == 0;
}

static enum verdict check(const struct job *job, struct crypt_data *space)
{
    /* A login with NUL or colon cannot be in the file, and must not match a shorter login. */
    bool possible = job->login_size > 0 && job->login_size < LINE_SIZE - 1 &&
                    strlen(job->login) == job->login_size && !strchr(job->login, ':') &&
                    strlen(job->password) == job->password_size;
    char hash[LINE_SIZE];
    enum verdict found = possible ? find_hash(job->login, hash, sizeof hash) : UNKNOWN;
    if (found == FAILED) return FAILED;
    const char *salt = found == UNKNOWN ? nobody : hash;
    memset(space, 0, sizeof *space);
    const char *result = crypt_r(job->password, salt, space);
    if (found == UNKNOWN) return UNKNOWN;
    /* For an unknown kind of hash, crypt_r returns NULL or a text that starts with *. */
    if (!result || *result == '*') return REFUSED;
    return equal(result, hash) ? ACCEPTED : REFUSED;
}

static void *run(void *unused)
{
    (void)unused;
    /* On the heap: too large for the stack of a thread. */
    struct crypt_data *space = malloc(sizeof *space);
    pthread_mutex_lock(&mutex);
    while (!stopping)
    {
        struct job *job = first;
        if (!job)
        {
            pthread_cond_wait(&work, &mutex);
            continue;
        }
        first = job->next;
        if (!first) last = &first;
        queued--;
        pthread_mutex_unlock(&mutex);

        enum verdict verdict = space ? check(job, space) : FAILED;

        pthread_mutex_lock(&mutex);
        job->verdict = verdict;
        pthread_mutex_unlock(&mutex);
        MQ_Retry(job->context);
        release(job);

        pthread_mutex_lock(&mutex);
    }
    pthread_mutex_unlock(&mutex);
    if (space) explicit_bzero(space, sizeof *space);
    free(space);
    return NULL;
}

MQ_EXPORT int mq_version(void)
{
    return MQ_API_VERSION;
}

MQ_EXPORT void mq_initialize(void)
{
    const char *setting = getenv("AUTH_FILE");
    path = setting && *setting ? setting : "/etc/mailerq/passwd";
    setting = getenv("AUTH_THREADS");
    int wanted = setting ? atoi(setting) : 2;
    if (wanted < 1 || wanted > MOST_THREADS) wanted = 2;
    stopping = false;
    thread_count = 0;
    while (thread_count < wanted && pthread_create(&threads[thread_count], NULL, run, NULL) == 0)
    {
        thread_count++;
    }
    if (!thread_count) MQ_Log(MQ_CRIT, "cannot start a thread, every login gets 454");
}

MQ_EXPORT void mq_cleanup(void)
{
    /* All contexts have ended, so no event waits for the remaining jobs. */
    pthread_mutex_lock(&mutex);
    stopping = true;
    pthread_cond_broadcast(&work);
    pthread_mutex_unlock(&mutex);
    while (thread_count > 0) pthread_join(threads[--thread_count], NULL);
    for (struct job *job; (job = first);)
    {
        first = job->next;
        release(job);
    }
    last = &first;
    queued = 0;
}

/**
 *  Queue the check of a login. Returns NULL if the queue is full or memory is short.
 */
static struct job *submit(MQ_Context *context, const char *login, size_t loginsize,
                          const char *passwd, size_t passwdsize)
{
    struct job *job = calloc(1, sizeof *job);
    if (!job) return NULL;
    job->context = context;
    job->login = copy(login, loginsize);
    job->password = copy(passwd, passwdsize);
    job->login_size = loginsize;
    job->password_size = passwdsize;
    job->holders = 2;           /* the connection and the thread */
    if (!job->login || !job->password)
    {
        free_job(job);
        return NULL;
    }
    pthread_mutex_lock(&mutex);
    bool accepted = thread_count > 0 && queued < LONGEST_QUEUE;
    if (accepted)
    {
        *last = job;
        last = &job->next;
        queued++;
        pthread_cond_signal(&work);
    }
    pthread_mutex_unlock(&mutex);
    if (accepted) return job;
    free_job(job);
    return NULL;
}

/**
 *  Take the verdict on this login and password from the connection; false if there is none.
 *  A verdict on another login belongs to an earlier event that was given up.
 */
static bool take_verdict(MQ_SmtpConnection *connection, const char *login, size_t loginsize,
                         const char *passwd, size_t passwdsize, enum verdict *verdict)
{
    struct job *job = MQ_SmtpData(connection);
    if (!job) return false;
    pthread_mutex_lock(&mutex);
    *verdict = job->verdict;
    pthread_mutex_unlock(&mutex);
    bool ours = *verdict != RUNNING &&
                job->login_size == loginsize && memcmp(job->login, login, loginsize) == 0 &&
                job->password_size == passwdsize && memcmp(job->password, passwd, passwdsize) == 0;
    MQ_SetSmtpData(connection, NULL);
    release(job);
    return ours;
}

MQ_EXPORT bool mq_smtp_in_authenticate(MQ_Context *context, MQ_SmtpConnection *connection,
                                       const char *login, size_t loginsize,
                                       const char *passwd, size_t passwdsize)
{
    enum verdict verdict;
    if (!take_verdict(connection, login, loginsize, passwd, passwdsize, &verdict))
    {
        struct job *job = submit(context, login, loginsize, passwd, passwdsize);
        MQ_SetSmtpData(connection, job);
        if (job) return true;
        verdict = FAILED;
    }
    switch (verdict)
    {
        case ACCEPTED:
            MQ_SetSmtpAuthenticated(connection, true);
            break;
        case REFUSED:
            MQ_SetSmtpAuthenticated(connection, false);
            break;
        case UNKNOWN:
            return false;
        default:
            MQ_Log(MQ_WARN, "a login could not be checked: the file or a thread is missing");
            MQ_Reject(connection, 454, "4.7.0 Temporary authentication failure");
            return false;
    }
    /* The login is known: skip the other plugins. */
    MQ_Complete(context);
    return true;
}

MQ_EXPORT bool mq_smtp_in_close(MQ_Context *context, MQ_SmtpConnection *connection)
{
    (void)context;
    struct job *job = MQ_SmtpData(connection);
    MQ_SetSmtpData(connection, NULL);
    if (job) release(job);
    return false;
}
