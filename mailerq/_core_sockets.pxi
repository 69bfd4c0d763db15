# Socket calls of `Stream` and `Poller`. They never block, so they keep Python's lock.
#
# If a call drops the lock, a waiting thread (the writer of the queue) takes it at once, and the
# loop sleeps until it has the lock again. On a busy relay this happened at every other call, and
# cost more than most of the calls.
#
# Each call passes MSG_DONTWAIT, because plugins know the descriptor and could make it blocking.

cdef extern from *:
    """
    #include <arpa/inet.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <sys/epoll.h>
    #include <sys/socket.h>

    typedef union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } mq_address;

    /* Write an address as text and port; "" and 0 for families other than IP. */
    static void mq_write_address(const mq_address *address, char *host, int *port)
    {
        host[0] = '\\0';
        *port = 0;
        if (address->any.sa_family == AF_INET) {
            inet_ntop(AF_INET, &address->v4.sin_addr, host, INET6_ADDRSTRLEN);
            *port = ntohs(address->v4.sin_port);
        } else if (address->any.sa_family == AF_INET6) {
            inet_ntop(AF_INET6, &address->v6.sin6_addr, host, INET6_ADDRSTRLEN);
            *port = ntohs(address->v6.sin6_port);
        }
    }

    static int mq_accept(int listening, char *host, int *port)
    {
        mq_address from = {.any = {.sa_family = AF_UNSPEC}};
        socklen_t size = sizeof(from);
        int fd;
        do
            fd = accept4(listening, &from.any, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
        while (fd < 0 && errno == EINTR);
        mq_write_address(&from, host, port);
        return fd;
    }

    static int mq_name(int fd, int remote, char *host, int *port)
    {
        mq_address name = {.any = {.sa_family = AF_UNSPEC}};
        socklen_t size = sizeof(name);
        int result = remote ? getpeername(fd, &name.any, &size) : getsockname(fd, &name.any, &size);
        mq_write_address(&name, host, port);
        return result;
    }

    /* Read an IP address without a zone; returns its size, 0 if the text is none. */
    static socklen_t mq_read_address(const char *host, int port, mq_address *address)
    {
        memset(address, 0, sizeof(*address));
        if (inet_pton(AF_INET, host, &address->v4.sin_addr) == 1) {
            address->v4.sin_family = AF_INET;
            address->v4.sin_port = htons(port);
            return sizeof(address->v4);
        }
        if (inet_pton(AF_INET6, host, &address->v6.sin6_addr) == 1) {
            address->v6.sin6_family = AF_INET6;
            address->v6.sin6_port = htons(port);
            return sizeof(address->v6);
        }
        return 0;
    }

    /* Begin to connect, from `local` if not NULL. Returns the descriptor, or -1 with errno; `bound`
       becomes false if the local address is the cause. */
    static int mq_connect(const char *host, int port, const char *local, int *bound)
    {
        mq_address remote, own;
        socklen_t size = mq_read_address(host, port, &remote), own_size = 0;
        int fd, on = 1, cause;
        *bound = 1;
        if (size == 0) {
            errno = EINVAL;
            return -1;
        }
        fd = socket(remote.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0)
            return -1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
        if (local != NULL) {
            own_size = mq_read_address(local, 0, &own);
            errno = EINVAL;
            *bound = own_size > 0 && bind(fd, &own.any, own_size) == 0;
        }
        if (*bound && (connect(fd, &remote.any, size) == 0 || errno == EINPROGRESS ||
                       errno == EINTR))
            return fd;
        cause = errno;
        close(fd);
        errno = cause;
        return -1;
    }

    static int mq_error(int fd)
    {
        int error = 0;
        socklen_t size = sizeof(error);
        return getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0 ? -1 : error;
    }

    static long mq_round_trip(int fd)
    {
        struct tcp_info info;
        socklen_t size = sizeof(info);
        memset(&info, 0, sizeof(info));
        return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) < 0 ? 0 : info.tcpi_rtt;
    }

    static int mq_watch(int epoll, int fd, unsigned events, int known)
    {
        struct epoll_event event = {.events = events, .data = {.fd = fd}};
        return epoll_ctl(epoll, known ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event);
    }
    """
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        unsigned events
        epoll_data_t data
    int epoll_wait(int, epoll_event *, int, int)
    int mq_watch(int, int, unsigned, int)
    int mq_accept(int, char *, int *)
    int mq_name(int, int, char *, int *)
    int mq_connect(const char *, int, const char *, int *)
    int mq_error(int)
    long mq_round_trip(int)
    enum:
        INET6_ADDRSTRLEN

cdef extern from * nogil:
    int EAGAIN, EINTR, EWOULDBLOCK
    int MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK
    Py_ssize_t recv(int, void *, size_t, int)
    Py_ssize_t c_send "send" (int, const void *, size_t, int)

cdef enum:
    RECEIVE_LIMIT = 1 << 16     # bytes of one read
    LONG_SEND = 1 << 14         # from this size, copying takes longer than dropping the lock
    EVENT_LIMIT = 256           # sockets of one epoll_wait; others come with the next

# Guarded by Python's lock, which is held from the read to the copy.
cdef char received[RECEIVE_LIMIT]


def socket_name(int fd, bint remote):
    """Return host and port of this end of a socket, or of the `remote` end. Raises OSError."""
    cdef char host[INET6_ADDRSTRLEN]
    cdef int port
    if mq_name(fd, remote, host, &port) < 0:
        PyErr_SetFromErrno(OSError)
    return host.decode("ascii"), port


def accept(int listening):
    """Accept a connection; return its descriptor, and the host and port of the peer.

    Return None if no connection waits. The descriptor is non-blocking, and the caller owns it.
    Raises OSError.
    """
    cdef char host[INET6_ADDRSTRLEN]
    cdef int port
    cdef int fd = mq_accept(listening, host, &port)
    if fd >= 0:
        return fd, (host.decode("ascii"), port)
    if errno == EAGAIN or errno == EWOULDBLOCK:
        return None
    PyErr_SetFromErrno(OSError)


def connect(str host not None, int port, str local=None):
    """Begin to connect to an IP address without a zone, from the address `local` if given.

    Return the descriptor, which is non-blocking and belongs to the caller, and whether `local`
    could be bound. If not, the descriptor is the negative error number. Raises OSError.
    """
    cdef bytes target = host.encode()
    cdef bytes source = None if local is None else local.encode()
    cdef const char *own = NULL
    cdef int bound
    cdef int fd
    if source is not None:
        own = source
    fd = mq_connect(target, port, own, &bound)
    if fd < 0 and bound:
        PyErr_SetFromErrno(OSError)
    return (fd, True) if fd >= 0 else (-errno, False)


def socket_error(int fd):
    """Return the pending error number of a socket, and clear it; 0 if there is none.

    Raises OSError if the descriptor is no socket.
    """
    cdef int error = mq_error(fd)
    if error < 0:
        PyErr_SetFromErrno(OSError)
    return error


def round_trip(int fd):
    """Seconds of a round trip to the peer as the kernel sees it; 0 for other than TCP sockets."""
    return mq_round_trip(fd) / 1e6


def receive(int fd):
    """Receive up to `RECEIVE_BYTES`: b"" at the end of the stream, None if nothing has arrived.

    Raises OSError.
    """
    cdef Py_ssize_t size
    while True:
        size = recv(fd, received, RECEIVE_LIMIT, MSG_DONTWAIT)
        if size >= 0:
            return received[:size]
        if errno == EAGAIN or errno == EWOULDBLOCK:
            return None
        if errno != EINTR:
            PyErr_SetFromErrno(OSError)


def has_input(int fd):
    """Whether bytes wait to be received."""
    return recv(fd, received, 1, MSG_DONTWAIT | MSG_PEEK) > 0


def send(int fd, bytes data not None, Py_ssize_t start=0):
    """Send `data[start:]` as far as the socket accepts it; return the number of bytes, maybe 0.

    Raises OSError.
    """
    cdef const char *rest = PyBytes_AS_STRING(data) + start
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data) - start
    cdef Py_ssize_t sent
    if not 0 <= start <= PyBytes_GET_SIZE(data):
        raise ValueError("start: outside of the data")
    while True:
        if size < LONG_SEND:
            sent = c_send(fd, rest, size, MSG_DONTWAIT | MSG_NOSIGNAL)
        else:
            with nogil:
                sent = c_send(fd, rest, size, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent >= 0:
            return sent
        if errno == EAGAIN or errno == EWOULDBLOCK:
            return 0
        if errno != EINTR:
            PyErr_SetFromErrno(OSError)


def watch(int epoll, int fd, unsigned events, bint known):
    """Register `fd` for `events` with an epoll descriptor. `known`: `fd` is already registered.

    Raises OSError.
    """
    if mq_watch(epoll, fd, events, known) < 0:
        PyErr_SetFromErrno(OSError)


def happenings(int epoll):
    """Return the current events of an epoll descriptor, as pairs of descriptor and events.

    Raises OSError.
    """
    # On the stack: making tuples may collect garbage, and so let another thread run this function.
    cdef epoll_event happened[EVENT_LIMIT]
    cdef int index
    cdef int count = epoll_wait(epoll, happened, EVENT_LIMIT, 0)
    if count < 0:
        if errno == EINTR:
            return []
        PyErr_SetFromErrno(OSError)
    return [(happened[index].data.fd, happened[index].events) for index in range(count)]


RECEIVE_BYTES = RECEIVE_LIMIT
