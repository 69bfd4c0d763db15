# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, nonecheck=False
"""The C core: load plugins, call them, and implement the MQ_ functions.

Theory of operation
-------------------
A *worker* is a thread that runs a trio loop. An *event* (a client connected, a recipient was named,
a body is about to be sent) goes through the *chain* of the plugins that export its callback. The
chains are dense arrays of (function, plugin), filled when the plugins are loaded and constant
afterwards. A session calls a method of its `Connection`. If no plugin listens to the event, the
method tests one bit and returns a ready awaitable. Otherwise there is one *crossing*: drop Python's
lock, call the whole chain, take the lock again.

An event that a plugin suspends stops in the chain, and the session awaits a `Call`. When the plugin
hands the event back, on any thread, the event goes on a list of its worker, and an eventfd wakes
the worker. The trio loop of the worker then takes a *turn*: it continues these chains, again in one
crossing, and tells plugins.py which calls have finished. A turn also runs timers, watchers and
libev callbacks, and passes on what plugins logged and sent from other threads.

Plugins never hold addresses. A context, connection, message, timer or watcher is a *handle*: a
number that names a *cell* and the generation of its content. All plugins share the cell of an
event; their handles differ in the number of the plugin. A comparison detects a handle that is used
late, twice, or by another plugin, and the call does nothing. See "Cells" below.

The parts, in the order of inclusion:

    cells        handles, and the cells, blocks and workers behind them
    log          lines from any thread to `logging`
    events       calling, suspending, handing back
    connection   MQ_Smtp*, MQ_Reject
    loop         libev, timers, watchers
    message      MQ_Message and its JSON
    ids          message ids
    faults       naming the plugin that ends the process
    watch        threads that block, and the deadline of a shutdown
    load         loading plugins
    sockets      non-blocking calls on sockets
    privileges   rights that a process gives up
    mapping      a file that is mapped into memory
    python       the classes that plugins.py builds on

Safety rules
------------
1. Code that a callback can reach is ``noexcept nogil``. It takes Python's lock in two places only:
   to make the JSON of a message, and to read back the changes of a plugin.
2. Take a cell and give it back on the thread of its worker. Other threads may change three things:
   the word of the cell of an event, by one compare-and-swap from a state in which their plugin has
   the event; the list of events that were handed back, by pushing; and the output of a connection,
   under the mutex of the worker, after comparing generations there.
3. From a successful hand-back in WAITING until the event is pushed, only the thread that hands back
   may touch the event.
4. Never free what a foreign thread can reach at any time: blocks, workers with their eventfds,
   tables and plugins. Reuse or keep them. Reach everything else through a comparison of
   generations.
5. Call no plugin code while holding one of our mutexes, except the lock of the loop, which is made
   for that. Never wait for Python's lock while holding a mutex that a thread with Python's lock may
   want. (Only the worker and its helper, which has no Python, want the lock of the loop.)
6. An event owns references to the Python objects that its pointers point into, and keeps them until
   it is handed back, even if its session no longer waits.
7. Every crossing is inside `mq_guard`, so that no C++ exception reaches a frame of C or Python.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_SetFromErrno
from cpython.memoryview cimport PyMemoryView_GET_BUFFER
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_DecodeASCII, PyUnicode_DecodeUTF8
from libc.limits cimport INT_MAX
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset, strchr, strlen, strncpy
from posix.fcntl cimport F_GETFD, fcntl
from posix.signal cimport sigfillset, sigset_t
from posix.time cimport (
    CLOCK_MONOTONIC, CLOCK_MONOTONIC_COARSE, CLOCK_REALTIME, clock_gettime, timespec,
)
from posix.unistd cimport close, getpid, read, write

import re
import sys
from logging import CRITICAL, INFO, WARNING, getLogger
from os import fsencode as os_fsencode, strerror as os_strerror

from mailerq.address import parse_mailbox
from mailerq.errors import AddressError, PluginError

cdef extern from *:
    """
    #include <dlfcn.h>
    #include <errno.h>
    #include <fcntl.h>
    #include <signal.h>
    #include <string.h>
    #include <sys/eventfd.h>
    #include <sys/random.h>
    #include <sys/resource.h>

    static const char *const mq_functions[] = {
        "mq_context_initialize", "mq_context_cleanup", "mq_smtp_in_connect", "mq_smtp_in_secure",
        "mq_smtp_in_authenticate", "mq_smtp_in_mailfrom", "mq_smtp_in_rcptto", "mq_smtp_in_data",
        "mq_smtp_in_message", "mq_smtp_in_close", "mq_smtp_out_data", "mq_smtp_out_sent",
        "a timer", "a watcher", "a libev callback",
    };
    """
    const char **FUNCTIONS "mq_functions"

cdef extern from * nogil:
    ctypedef struct Dl_info:
        const char *dli_fname
        void *dli_fbase
    int RTLD_NOW, RTLD_LAZY, RTLD_NOLOAD, RTLD_GLOBAL, RTLD_LOCAL
    void *dlopen(const char *, int)
    void *dlsym(void *, const char *)
    const char *dlerror()
    int dladdr(void *, Dl_info *)
    int errno, EBADF
    int F_DUPFD_CLOEXEC, RLIMIT_NOFILE
    ctypedef unsigned long rlim_t
    struct rlimit:
        rlim_t rlim_cur
    int getrlimit(int, rlimit *)
    int EFD_NONBLOCK, EFD_CLOEXEC
    int eventfd(unsigned int, int)
    Py_ssize_t getrandom(void *, size_t, unsigned int)
    size_t strnlen(const char *, size_t)
    char *strndup(const char *, size_t)
    void explicit_bzero(void *, size_t)
    int SIG_SETMASK
    int pthread_sigmask(int, const sigset_t *, sigset_t *)

cdef enum:
    TEXT_LIMIT = 2000           # bytes of the text of a reject
    OUTPUT_LIMIT = 1 << 26      # bytes of MQ_SmtpSend that may wait on one connection
    DEPTH_LIMIT = 200           # nesting of JSON

EVENTS = ("context_initialize", "context_cleanup", "connect", "secure", "authenticate", "mailfrom",
          "rcptto", "data", "message", "close", "out_data", "out_sent", "timer", "watcher")
CALLBACKS = ("mq_version", "mq_initialize", "mq_cleanup",
             *[FUNCTIONS[number].decode() for number in range(CHAINS)],
             "mq_message_id_size", "mq_message_id")
OUTCOMES = ("undecided", "decided", "rejected", "timed out", "looped", "threw", "mistyped")
LEVELS = {MQ_CRIT: CRITICAL, MQ_WARN: WARNING, MQ_INFO: INFO}
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
logger = getLogger("mailerq.plugins")

include "_core_cells.pxi"
include "_core_log.pxi"
include "_core_events.pxi"
include "_core_connection.pxi"
include "_core_loop.pxi"
include "_core_message.pxi"
include "_core_ids.pxi"
include "_core_faults.pxi"
include "_core_watch.pxi"
include "_core_load.pxi"
include "_core_sockets.pxi"
include "_core_privileges.pxi"
include "_core_mapping.pxi"
include "_core_python.pxi"

pthread_mutex_init(&registry, NULL)
prepare_pairs()
pthread_atfork(NULL, NULL, forked)


def set_machine(uint64_t number):
    """Set the number of this machine in message ids; the low 35 bits are used."""
    global machine, epoch
    machine = number
    epoch += 1


def crypt(bytes password not None, bytes setting not None):
    """Hash a password with crypt(3); `setting` is a hash, or its start with method and salt.

    Return None if the method is not supported or the setting is invalid. Runs without Python's
    lock, as slowly as the method requires.
    """
    cdef const char *key = password
    cdef const char *method = setting
    cdef const char *result
    cdef crypt_data *space = <crypt_data *> calloc(1, sizeof(crypt_data))
    if space == NULL:
        raise MemoryError
    try:
        with nogil:
            result = crypt_r(key, method, space)
        # A result that starts with an asterisk means failure, and is no hash of any password.
        return result if result != NULL and result[0] != b"*" else None
    finally:
        explicit_bzero(space, sizeof(crypt_data))
        free(space)
