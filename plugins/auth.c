/*
 *  auth - checks logins against a file of password hashes.
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -pthread -I../include -o auth.so auth.c -lcrypt
 *
 *  Each line of the file is "login:hash", the hash as crypt(3) makes it; further fields
 *  behind a second colon, empty lines, and lines that start with # are ignored. To add one:
 *
 *      echo "ann:$(openssl passwd -6)" >> /etc/mailerq/passwd
 *
 *      AUTH_FILE=/etc/mailerq/passwd       read anew for every login, so edits count at once
 *      AUTH_THREADS=2                      how many hashes are computed at the same time
 *
 *  A login that is not in the file is left to other plugins and to the configuration.
 *
 *  The pattern: slow work on threads of our own. A good password hash takes a tenth of a
 *  second on purpose, and reading a file may take longer than anybody thinks; on the worker
 *  that would hold up every session. So the callback puts a job into a queue and returns
 *  true. A thread of ours does the job. From there only MQ_Continue, MQ_Complete, MQ_Retry,
 *  MQ_SmtpSend and MQ_Log may be called, and not MQ_SetSmtpAuthenticated. Hence the thread
 *  leaves its verdict in the job and calls MQ_Retry: the callback runs again, on the worker,
 *  finds the verdict and gives the answer.
 *
 *  Who frees a job? It is held by its connection and by the thread; `holders` counts them,
 *  and the last one frees it. So nothing happens to the thread when the event is given up
 *  (plugin-timeout) and the connection ends meanwhile.
 */
#define _GNU_SOURCE             /* crypt_r, explicit_bzero */
#include <mailerq.h>

#include <crypt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LONGEST_QUEUE 1000      /* jobs; more logins than that are answered with 454 */
#define MOST_THREADS 64
#define LINE_SIZE 1024

enum verdict { RUNNING, ACCEPTED, REFUSED, UNKNOWN, FAILED };

/** The check of one login. All but the mutable last part is written before it is queued. */
struct job
{
    MQ_Context *context;
    char *login, *password;     /* copies: those of the event end when it is given up */
    size_t login_size, password_size;

    struct job *next;           /* guarded by the mutex, as the rest */
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

/** Somebody to compare with who does not exist, so that an unknown login takes as long. */
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

/** Give up one hold on a job. */
static void release(struct job *job)
{
    pthread_mutex_lock(&mutex);
    bool free_it = --job->holders == 0;
    pthread_mutex_unlock(&mutex);
    if (free_it) free_job(job);
}

/**
 *  Find the hash of a login. Returns FAILED when the file cannot be read, UNKNOWN when the
 *  login is not in it, otherwise RUNNING with the hash in `hash`.
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

/** Compare without telling by the time it takes where the difference is. */
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
    /* NUL and colon are in no login of the file; one that is cut there is another one. */
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
    /* crypt_r gives NULL, or a text that starts with *, for a hash that it does not know. */
    if (!result || *result == '*') return REFUSED;
    return equal(result, hash) ? ACCEPTED : REFUSED;
}

static void *run(void *unused)
{
    (void)unused;
    /* Too large for the stack of a thread. */
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
    /* All contexts have ended, so nobody waits for the jobs that may still be there. */
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
 *  Put a login into the queue; NULL when it is full, or memory is.
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
 *  Take the verdict about this very login and password from the connection; false when there
 *  is none. One about others is of an earlier attempt, which was given up meanwhile.
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
    /* We know this login: the other plugins need not be asked. */
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
