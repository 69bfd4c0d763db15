"""The structs behind the handles, and the C libraries that `_core` calls."""

from libc.stdint cimport uint64_t

cdef extern from "<stdbool.h>":
    ctypedef bint c_bool "bool"

# The public header goes into the generated C, so the compiler holds each function of `_core`
# against its prototype there.
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


# What a plugin can be given. Also the kinds of blocks; an unused block is of kind 0.
cdef enum:
    EVENT = 1
    CONNECTION
    MESSAGE
    TIMER
    WATCHER
    KINDS

# The events, in the order of `EVENTS` in _core.pyx. TIMER_CALL and WATCHER_CALL have no chain;
# they are there for the statistics.
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
    RAW_CALL = FIGURES          # of a plugin's own libev watcher: not counted

# The state of a cell: the lowest bits of its word. Only an event has more than two.
cdef enum:
    FREE         # in a pool
    IDLE         # in use; as an event: no plugin has it
    RUNNING      # the callback of the plugin in the word is being called
    WAITING      # that plugin returned true and has not handed back
    CONTINUED    # that plugin has handed back, with MQ_Continue,
    COMPLETED    # with MQ_Complete,
    RETRIED      # with MQ_Retry
    GIVEN_UP     # nobody waits for it any more, but the plugin has not handed back

# How an event ended.
cdef enum:
    UNDECIDED    # every plugin was asked, or there was none
    DECIDED      # MQ_Complete
    REJECTED     # MQ_Reject
    TIMED_OUT    # not handed back in time
    LOOPED       # restarted too often
    THREW        # a C++ exception came out of a callback
    MISTYPED     # a property of the message was given a wrong type


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
    Plugin *next                # of all that were ever opened
    int index
    void *library
    void *base          # where the file is mapped, to know it by an address in it,
    void *end           # and the first address behind it
    char name[256]

cdef struct Hook:
    void *function
    int plugin

# What is filled at load and constant afterwards, apart from the bits for Python's handlers.
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


# The head of everything that a plugin can be given a handle of.
cdef struct Cell:
    uint64_t word
    Cell *next                  # in the pool

cdef struct Block:
    Worker *owner
    char *cells
    size_t size
    uint64_t floor              # older generations belong to a former owner
    int kind

cdef struct Text:
    const char *data            # NULL: unset
    size_t size
    char *copy                  # what a setter left, ours to free, or NULL
    char *lent                  # what the plugin got instead of the inside of `object`; the same
    void *object                # the str or bytes that data was borrowed from at first; owned
    c_bool changed

# What is known of the client of a connection, for MQ_Client…: see `FACTS` in _core_python.pxi.
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
    char text[1]                # longer, in fact

cdef struct ConnectionCell:
    Cell cell
    Worker *worker
    EventCell *event            # the one that is going on, or NULL
    void *python                # the Connection, borrowed; NULL when it is gone
    void **data                 # by plugin
    int fd
    c_bool secure
    c_bool authenticated
    c_bool decided              # MQ_SetSmtpAuthenticated was called in this event
    c_bool closed
    c_bool queued               # is in Worker.outputs
    int kept                    # events that were given up and not handed back
    int port                    # of the client
    Fact *facts[FACT_COUNT]     # of the client; NULL: none
    Fact *former                # facts that were replaced while `kept` was not 0
    char *output                # from MQ_SmtpSend, under Worker.mutex
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
    c_bool touched              # the plugin that has the event asked for the JSON or set something
    json_object *json           # NULL until a plugin asks
    void *message               # the Message that the setters change, owned
    void *document              # the Message that the JSON is made of, owned
    void *hidden                # a dict: properties that json-c cannot hold, owned, or NULL
    void *body                  # the body that the JSON last agreed with, owned, or NULL

cdef struct EventCell:
    Cell cell
    Worker *worker
    Table *table
    int number
    int position                # the next hook
    int restarts
    int outcome
    int culprit                 # the plugin that the outcome is about, or -1
    c_bool finished
    c_bool noted                # one of: code is set, message.touched, cancelled
    c_bool cancelled            # nobody wants the other plugins
    int code                    # of MQ_Reject; 0: none
    char *text
    ConnectionCell *connection
    MessageCell *message
    Text first                  # what the event is about: an address, a login, a whole mail
    Text second
    void *call                  # the Call, owned, from the moment that it is suspended
    EventCell *handed           # next in Worker.handed; whoever hands back writes it
    EventCell *moved            # next in the list that a turn makes of that
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
    char text[1]                # longer, in fact

cdef struct Loop:
    ev_loop *ev
    ev_async poke               # makes the helper look at the loop again
    pthread_t helper
    pthread_mutex_t lock
    pthread_cond_t invoked
    c_bool stopping

# One worker thread, a "context" for plugins. Pooled and never freed: see safety rule 4.
cdef struct Worker:
    Worker *next                # of all there ever were
    c_bool open
    pthread_t thread
    int wakeup                  # an eventfd,
    int spare                   # and a copy of it, in case that a plugin closes it
    Table *table
    Figures *figures            # FIGURES rows of one for each plugin
    void **data                 # context data, by plugin
    int running_plugin          # what the thread is in just now; -1: no plugin
    int running_event
    EventCell *current          # the event that is being called, or NULL
    Cell *pool[KINDS]
    long live[KINDS]
    EventCell *context          # the event of mq_context_initialize, kept while the worker lives
    uint64_t context_identity
    EventCell *handed           # suspended events that were handed back; any thread pushes
    pthread_mutex_t mutex       # guards what follows, up to the timers
    EventCell *waiting          # the suspended events
    ConnectionCell *outputs     # connections with output that the engine does not know of
    Cell *orphans               # connection cells that were released on another thread
    TimerCell *timers
    WatcherCell *watchers
    Loop *loop                  # NULL until a plugin asks
    c_bool inside               # a call into plugins is going on,
    c_bool locked               # and this thread holds the loop's lock
    c_bool touched              # the helper must look at the loop again
    c_bool any_raw              # some plugin has asked for the loop itself:
    int raw_plugin              # the only one that did; -1: there are more, or none
    uint64_t crossings          # calls into plugins that began
    void *stack                 # of the handlers of faults
