"""The process that moves style sheets into the elements of HTML, one text after another.

A request on standard input, and the answer on standard output, is four bytes with the length and
the text in UTF-8. The answer starts with ``+``, or with ``-`` and why there is none. The process
ends with its standard input. `mailerq.outbound.inliner` starts it.
"""

from __future__ import annotations

import resource
import signal
import sys

MEMORY_BYTES = 1 << 30
"""Address space of the process: hostile HTML can make a tree of any size."""

ALARM_SECONDS = 30
"""The process that asks kills this one before. If that process is gone, nobody else does."""

# A stop of the daemon may signal all its processes, and mail is still on its way then.
IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


def main() -> None:
    """Serve requests."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    import css_inline

    # Nothing is read from files or from the network.
    inliner = css_inline.CSSInliner(load_remote_stylesheets=False, keep_at_rules=True)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(size := requests.read(4)) == 4:
        html = requests.read(int.from_bytes(size, "big")).decode(errors="replace")
        signal.alarm(ALARM_SECONDS)
        try:
            answer = "+" + (inliner.inline(html) if html else "")
        except css_inline.InlineError as error:
            answer = f"-{error}"
        signal.alarm(0)
        data = answer.encode(errors="replace")
        answers.write(len(data).to_bytes(4, "big") + data)
        answers.flush()


if __name__ == "__main__":
    main()
