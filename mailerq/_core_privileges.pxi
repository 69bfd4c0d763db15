# What a process gives up for good. Each call is for the calling thread and those that it starts, so
# it comes before there are others.

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

    /* Goes on after an error, and returns the first one. */
    static int mq_keep_capabilities(uint64_t kept, uint64_t bounding)
    {
        struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
        struct __user_cap_data_struct sets[2];
        int error = 0;
        /* First, for it needs a capability itself. */
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
    """Have no program that is executed gain rights by its file. Raises OSError."""
    cdef int error = mq_no_new_privileges()
    if error:
        raise OSError(error, os_strerror(error))


def keep_capabilities(uint64_t kept, uint64_t bounding):
    """Keep these capabilities, bits of their numbers, and let programs have `bounding` at most.

    Raises OSError when the system refuses a part of it; the rest is done.
    """
    cdef int error = mq_keep_capabilities(kept, bounding)
    if error:
        raise OSError(error, os_strerror(error))
