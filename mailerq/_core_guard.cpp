/*
 *  Keep C++ exceptions of plugins out of C code.
 *
 *  An exception that leaves a callback of a C++ plugin would end the process, because C code
 *  cannot catch it. So this one function is C++. It surrounds a whole crossing, not each call,
 *  and costs one call: entering a try block executes no code.
 */
#include <cxxabi.h>

#include <cstddef>
#include <cstdio>
#include <exception>

/*
 *  Call function(argument). Returns 0, or 1 after an exception, whose message is stored in text.
 *  A thread that is being cancelled goes on unwinding.
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
