# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, nonecheck=False
"""The C core: opens plugins, calls them, and is what they call."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_DecodeASCII, PyUnicode_DecodeUTF8
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset, strlen, strncpy
from posix.fcntl cimport F_GETFD, fcntl
from posix.signal cimport sigfillset, sigset_t
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport getpid, read, write

import re
from logging import CRITICAL, INFO, WARNING, getLogger
from os import fsencode as os_fsencode

from mailerq.errors import PluginError

cdef extern from *:
    """
    #include <dlfcn.h>
    #include <signal.h>
    #include <string.h>
    #include <sys/eventfd.h>
    #include <sys/random.h>

    static const char *const mq_functions[] = {
        "mq_context_initialize", "mq_context_cleanup", "mq_smtp_in_connect", "mq_smtp_in_secure",
        "mq_smtp_in_authenticate", "mq_smtp_in_mailfrom", "mq_smtp_in_rcptto", "mq_smtp_in_data",
        "mq_smtp_in_message", "mq_smtp_in_close", "mq_smtp_out_data", "mq_smtp_out_sent",
        "a timer", "a watcher",
    };
    """
    const char **FUNCTIONS "mq_functions"

cdef extern from * nogil:
    ctypedef struct Dl_info:
        const char *dli_fname
        void *dli_fbase
    int RTLD_NOW, RTLD_NOLOAD, RTLD_GLOBAL, RTLD_LOCAL
    void *dlopen(const char *, int)
    void *dlsym(void *, const char *)
    const char *dlerror()
    int dladdr(void *, Dl_info *)
    int EFD_NONBLOCK, EFD_CLOEXEC
    int eventfd(unsigned int, int)
    Py_ssize_t getrandom(void *, size_t, unsigned int)
    size_t strnlen(const char *, size_t)
    char *strndup(const char *, size_t)
    void explicit_bzero(void *, size_t)
    int SIG_SETMASK
    int pthread_sigmask(int, const sigset_t *, sigset_t *)

cdef enum:
    TEXT_LIMIT = 2000           # bytes of a reject's text
    OUTPUT_LIMIT = 1 << 26      # bytes that MQ_SmtpSend may have waiting on one connection
    DEPTH_LIMIT = 200           # nesting of JSON

EVENTS = ("context_initialize", "context_cleanup", "connect", "secure", "authenticate", "mailfrom",
          "rcptto", "data", "message", "close", "out_data", "out_sent", "timer", "watcher")
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
include "_core_load.pxi"
include "_core_python.pxi"

pthread_mutex_init(&registry, NULL)
prepare_pairs()
pthread_atfork(NULL, NULL, forked)


def set_machine(uint64_t number):
    """Set the number of this machine in message ids; 35 bits of it count."""
    global machine, epoch
    machine = number
    epoch += 1


def crypt(bytes password not None, bytes setting not None):
    """crypt(3): the hash of a password with the method and salt of `setting`, a hash or its start.

    None when the method is unknown here or the setting is none. It takes as long as the method is
    meant to take, without Python's lock.
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
        # A hash that starts with an asterisk stands for a failure, and no password has it.
        return result if result != NULL and result[0] != b"*" else None
    finally:
        explicit_bzero(space, sizeof(crypt_data))
        free(space)
