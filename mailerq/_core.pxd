"""The structs behind the handles, and the C libraries that `_core` calls."""

from libc.stdint cimport uint64_t

cdef extern from "<stdbool.h>":
    ctypedef bint c_bool "bool"

# The generated C includes the public header, so the compiler checks each MQ_ function of `_core`
# against its prototype.
cdef extern from "mailerq.h" nogil:
    enum:
        MQ_API_VERSION
        MQ_READ
        MQ_WRITE
        MQ_CRIT
        MQ_WARN
        MQ_INFO
    struct MQ_Context:
        pass
    struct MQ_SmtpConnection:
        pass
    struct MQ_Message:
        pass
    struct MQ_Timer:
        pass
    struct MQ_IOWatcher:
        pass

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    pthread_t pthread_self()
    int pthread_equal(pthread_t, pthread_t)
    int pthread_create(pthread_t *, const void *, void *(*)(void *) noexcept nogil, void *)
    int pthread_join(pthread_t, void **)
    int pthread_mutex_init(pthread_mutex_t *, const void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_cond_init(pthread_cond_t *, const void *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_atfork(void (*)() noexcept nogil, void (*)() noexcept nogil,
                       void (*)() noexcept nogil)

cdef extern from "<ev.h>" nogil:
    enum:
        EV_READ
        EV_WRITE
        EVFLAG_NOENV
        EVBREAK_ALL
    struct ev_loop:
        pass
    ctypedef struct ev_io:
        void *data
    ctypedef struct ev_timer:
        void *data
        double repeat
    ctypedef struct ev_async:
        void *data
    ev_loop *ev_loop_new(unsigned int)
    void ev_loop_destroy(ev_loop *)
    void ev_set_syserr_cb(void (*)(const char *) noexcept nogil)
    void ev_run(ev_loop *, int)
    void ev_break(ev_loop *, int)
    void ev_now_update(ev_loop *)
    void ev_set_userdata(ev_loop *, void *)
    void *ev_userdata(ev_loop *)
    void ev_set_loop_release_cb(ev_loop *, void (*)(ev_loop *) noexcept nogil,
                                void (*)(ev_loop *) noexcept nogil)
    void ev_set_invoke_pending_cb(ev_loop *, void (*)(ev_loop *) noexcept nogil)
    void ev_invoke_pending(ev_loop *)
    unsigned int ev_pending_count(ev_loop *)
    void ev_io_init(ev_io *, void (*)(ev_loop *, ev_io *, int) noexcept nogil, int, int)
    void ev_io_start(ev_loop *, ev_io *)
    void ev_io_stop(ev_loop *, ev_io *)
    void ev_timer_init(ev_timer *, void (*)(ev_loop *, ev_timer *, int) noexcept nogil,
                       double, double)
    void ev_timer_set(ev_timer *, double, double)
    void ev_timer_start(ev_loop *, ev_timer *)
    void ev_timer_stop(ev_loop *, ev_timer *)
    void ev_async_init(ev_async *, void (*)(ev_loop *, ev_async *, int) noexcept nogil)
    void ev_async_start(ev_loop *, ev_async *)
    void ev_async_send(ev_loop *, ev_async *)
    bint ev_is_pending(ev_async *)

cdef extern from "<json-c/json.h>" nogil:
    struct json_object:
        pass
    ctypedef enum json_type:
        json_type_null
        json_type_boolean
        json_type_double
        json_type_int
        json_type_object
        json_type_array
        json_type_string
    struct lh_entry:
        lh_entry *next
    struct lh_table:
        lh_entry *head
    void *lh_entry_k(const lh_entry *)
    void *lh_entry_v(const lh_entry *)
    int json_object_put(json_object *)
    json_type json_object_get_type(const json_object *)
    json_object *json_object_new_object()
    json_object *json_object_new_array()
    json_object *json_object_new_boolean(int)
    json_object *json_object_new_int64(long long)
    json_object *json_object_new_uint64(unsigned long long)
    json_object *json_object_new_double(double)
    json_object *json_object_new_double_s(double, const char *)
    json_object *json_object_new_string_len(const char *, int)
    lh_table *json_object_get_object(const json_object *)
    bint json_object_object_get_ex(const json_object *, const char *, json_object **)
    int json_object_object_add(json_object *, const char *, json_object *)
    void json_object_object_del(json_object *, const char *)
    int json_object_array_add(json_object *, json_object *)
    size_t json_object_array_length(const json_object *)
    json_object *json_object_array_get_idx(const json_object *, size_t)
    int json_object_get_boolean(const json_object *)
    long long json_object_get_int64(const json_object *)
    unsigned long long json_object_get_uint64(const json_object *)
    const char *json_object_get_string(json_object *)
    int json_object_get_string_len(const json_object *)
    const char *json_object_to_json_string(json_object *)

cdef extern from "<crypt.h>" nogil:
    struct crypt_data:
        pass
    char *crypt_r(const char *, const char *, crypt_data *)


# The kinds of handles, and of blocks. An unused block has kind 0.
cdef enum:
    EVENT = 1
    CONNECTION
    MESSAGE
    TIMER
    WATCHER
    KINDS

# The events, in the order of `EVENTS` in _core.pyx. TIMER_CALL and WATCHER_CALL have no chain and
# serve the statistics only.
cdef enum:
    CONTEXT_INITIALIZE
    CONTEXT_CLEANUP
    CONNECT
    SECURE
    AUTHENTICATE
    MAILFROM
    RCPTTO
    DATA
    ON_MESSAGE
    CLOSE
    OUT_DATA
    OUT_SENT
    CHAINS
    TIMER_CALL = CHAINS
    WATCHER_CALL
    FIGURES
    RAW_CALL = FIGURES          # a libev watcher of a plugin; not counted

# The state of a cell, in the lowest bits of its word. Only events use states after IDLE.
cdef enum:
    FREE         # in a pool
    IDLE         # in use; no plugin has the event
    RUNNING      # the callback of the plugin in the word is running
    WAITING      # the plugin returned true and has not handed back
    CONTINUED    # the plugin handed back with MQ_Continue
    COMPLETED    # the plugin handed back with MQ_Complete
    RETRIED      # the plugin handed back with MQ_Retry
    GIVEN_UP     # the session no longer waits, but the plugin has not handed back

# The outcome of an event.
cdef enum:
    UNDECIDED    # all plugins were called, or there was none
    DECIDED      # MQ_Complete
    REJECTED     # MQ_Reject
    TIMED_OUT    # not handed back in time
    LOOPED       # retried too often
    THREW        # a callback threw a C++ exception
    MISTYPED     # a plugin gave a property of the message a wrong type


ctypedef void (*timer_function)(void *data) noexcept nogil
ctypedef void (*watcher_function)(MQ_IOWatcher *watcher, int fd, int events,
                                  void *data) noexcept nogil
ctypedef size_t (*id_function_type)(char *, size_t) noexcept nogil

cdef struct Worker
cdef struct EventCell
cdef struct ConnectionCell
cdef struct TimerCell
cdef struct WatcherCell

cdef struct Plugin:
    Plugin *next                # list of all plugins ever opened
    int index
    void *library
    void *base                  # address range of the mapped file: start
    void *end                   # and end, to find the plugin of an address
    char name[256]

cdef struct Hook:
    void *function
    int plugin

# Filled at load and constant afterwards, except python_events.
cdef struct Table:
    int plugins
    Plugin **plugin
    Hook *hooks[CHAINS]         # dense, in load order
    int length[CHAINS]
    uint64_t c_events           # bit n: some plugin exports event n
    uint64_t python_events      # bit n: Python has a handler for event n
    int id_owner                # the plugin that makes message ids, or -1
    size_t id_size
    id_function_type id_function

cdef struct Figures:
    uint64_t calls
    uint64_t suspensions
    uint64_t rejects
    uint64_t timeouts
    uint64_t nanoseconds


# The head of every object that has handles.
cdef struct Cell:
    uint64_t word
    Cell *next                  # in the pool

cdef struct Block:
    Worker *owner
    char *cells
    size_t size
    uint64_t floor              # older generations belong to a previous owner
    int kind

cdef struct Text:
    const char *data            # NULL: unset
    size_t size
    char *copy                  # set by a setter, owned, or NULL
    char *lent                  # a copy of the bytes of `object` for the plugin, owned, or NULL
    void *object                # the str or bytes that data was first borrowed from, owned
    c_bool changed

# Facts about the client of a connection, for the MQ_Client… functions.
cdef enum:
    FACT_ADDRESS
    FACT_HELO
    FACT_LOGIN
    FACT_TLS_VERSION
    FACT_TLS_CIPHER
    FACT_TLS_NAME
    FACT_COUNT

cdef struct Fact:
    Fact *next                  # in ConnectionCell.former
    size_t size
    char text[1]                # size + 1 bytes

cdef struct ConnectionCell:
    Cell cell
    Worker *worker
    EventCell *event            # the current event, or NULL
    void *python                # the Connection, borrowed; NULL after its end
    void **data                 # by plugin
    int fd
    c_bool secure
    c_bool authenticated
    c_bool decided              # MQ_SetSmtpAuthenticated was called in this event
    c_bool closed
    c_bool queued               # listed in Worker.outputs
    int kept                    # number of events that were given up and not handed back
    int port                    # port of the client
    Fact *facts[FACT_COUNT]     # facts about the client; NULL: unknown
    Fact *former                # facts that were replaced while `kept` was not 0
    char *output                # bytes of MQ_SmtpSend, guarded by Worker.mutex
    size_t output_size
    size_t output_room
    ConnectionCell *next_output

cdef struct MessageCell:
    Cell cell
    Worker *worker
    EventCell *event
    Text envelope
    Text recipient
    Text mime
    c_bool local
    c_bool touched              # the current plugin called MQ_Json or a setter
    json_object *json           # NULL until a plugin calls MQ_Json
    void *message               # the Message that the setters change, owned
    void *document              # the Message that the JSON shows, owned
    void *hidden                # a dict of properties that json-c cannot hold, owned, or NULL
    void *body                  # the body when the JSON was last made or read, owned, or NULL

cdef struct EventCell:
    Cell cell
    Worker *worker
    Table *table
    int number
    int position                # the next hook
    int restarts
    int outcome
    int culprit                 # the plugin that caused the outcome, or -1
    c_bool finished
    c_bool noted                # decide() has work: a reject, a touched message, or cancelled
    c_bool cancelled            # do not call the other plugins
    int code                    # code of MQ_Reject; 0: no reject
    char *text
    ConnectionCell *connection
    MessageCell *message
    Text first                  # the argument: an address, a login, a whole mail
    Text second                 # the second argument: a password
    void *call                  # the Call, owned, once the event is suspended
    EventCell *handed           # next in Worker.handed; written by the thread that hands back
    EventCell *moved            # next in the list that `resume` makes of Worker.handed
    EventCell *later            # neighbours in Worker.waiting
    EventCell *earlier

cdef struct TimerCell:
    Cell cell
    Worker *worker
    int plugin
    ev_timer timer
    timer_function callback
    void *data
    TimerCell *later
    TimerCell *earlier

cdef struct WatcherCell:
    Cell cell
    Worker *worker
    int plugin
    int fd
    ev_io io
    watcher_function callback
    void *data
    WatcherCell *later
    WatcherCell *earlier

cdef struct Line:
    Line *next
    const char *plugin
    int priority
    char text[1]                # as long as the line

cdef struct Loop:
    ev_loop *ev
    ev_async poke               # makes the helper check the loop again
    pthread_t helper
    pthread_mutex_t lock
    pthread_cond_t invoked
    c_bool stopping

# One worker thread, a "context" for plugins. Pooled and never freed: see safety rule 4.
cdef struct Worker:
    Worker *next                # list of all workers ever made
    c_bool open
    pthread_t thread
    int wakeup                  # an eventfd
    int spare                   # a copy of `wakeup`, in case a plugin closes it
    Table *table
    Figures *figures            # FIGURES rows, with one entry for each plugin
    void **data                 # context data, by plugin
    int running_plugin          # the plugin that the thread is in; -1: none
    int running_event
    EventCell *current          # the event that is being called, or NULL
    Cell *pool[KINDS]
    long live[KINDS]
    EventCell *context          # the event of mq_context_initialize, kept while the worker lives
    uint64_t context_identity
    EventCell *handed           # suspended events that were handed back; any thread pushes
    pthread_mutex_t mutex       # guards the fields below, down to `orphans`
    EventCell *waiting          # the suspended events
    ConnectionCell *outputs     # connections with output to announce to the engine
    Cell *orphans               # connection cells that were released on another thread
    TimerCell *timers
    WatcherCell *watchers
    Loop *loop                  # NULL until a plugin needs the loop
    c_bool inside               # a call into plugins is running
    c_bool locked               # this thread holds the lock of the loop
    c_bool touched              # the helper must check the loop again
    c_bool any_raw              # a plugin has called MQ_ev
    int raw_plugin              # the only plugin that called MQ_ev; -1: several or none
    uint64_t crossings          # number of calls into plugins
    void *stack                 # stack of the fault handlers
