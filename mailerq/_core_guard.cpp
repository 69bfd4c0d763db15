/*
 *  Keeps the C++ exceptions of plugins away from C.
 *
 *  A plugin may be written in C++, and an exception that leaves one of its callbacks would find
 *  nobody on this side who catches it: the runtime would end the process. Only C++ can catch, so
 *  this one function is C++. It stands around a whole crossing, not around each call, and costs
 *  one call: tables, not code, tell the unwinder where it is.
 */
#include <cxxabi.h>

#include <cstddef>
#include <cstdio>
#include <exception>

/*
 *  Call function(argument). Returns 0, or 1 when an exception came out of it, with what it said
 *  about itself in text. A thread that is being cancelled goes on unwinding.
 */
extern "C" int mq_guard(void (*function)(void *), void *argument, char *text, std::size_t size)
{
    try {
        function(argument);
        return 0;
    } catch (const abi::__forced_unwind &) {
        throw;
    } catch (const std::exception &error) {
        std::snprintf(text, size, "%s", error.what());
    } catch (...) {
        std::snprintf(text, size, "not a std::exception");
    }
    return 1;
}
