# Rights that a process gives up for good. Each call affects the calling thread and the threads that
# it starts, so call these before starting threads.

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/capability.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    static int mq_no_new_privileges(void)
    {
        return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ? errno : 0;
    }

    /* Continues after an error, and returns the first error. */
    static int mq_keep_capabilities(uint64_t kept, uint64_t bounding)
    {
        struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
        struct __user_cap_data_struct sets[2];
        int error = 0;
        /* The bounding set first: dropping from it needs a capability. */
        for (int number = 0; number < 64; number++) {
            int there = prctl(PR_CAPBSET_READ, number, 0, 0, 0) > 0;
            int drop = there && !(bounding >> number & 1);
            if (drop && prctl(PR_CAPBSET_DROP, number, 0, 0, 0) && !error)
                error = errno;
        }
        if (syscall(SYS_capget, &head, sets))
            return error ? error : errno;
        for (int half = 0; half < 2; half++) {
            uint32_t mask = (uint32_t) (kept >> 32 * half);
            sets[half].permitted &= mask;
            sets[half].effective &= mask;
            sets[half].inheritable &= mask;
        }
        if (syscall(SYS_capset, &head, sets) && !error)
            error = errno;
        return error;
    }
    """
    int mq_no_new_privileges() nogil
    int mq_keep_capabilities(uint64_t kept, uint64_t bounding) nogil


def no_new_privileges():
    """Keep executed programs from gaining rights by setuid and the like. Raises OSError."""
    cdef int error = mq_no_new_privileges()
    if error:
        raise OSError(error, os_strerror(error))


def keep_capabilities(uint64_t kept, uint64_t bounding):
    """Keep only the capabilities `kept`, and limit executed programs to `bounding`.

    Both are bits of capability numbers. Raises OSError if the system refuses a part; the rest is
    done.
    """
    cdef int error = mq_keep_capabilities(kept, bounding)
    if error:
        raise OSError(error, os_strerror(error))
