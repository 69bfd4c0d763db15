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


def main() -> None:
    """Serve requests."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    import css_inline

    # Nothing is read from files or from the network.
    inliner = css_inline.CSSInliner(load_remote_stylesheets=False, keep_at_rules=True)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(size := requests.read(4)) == 4:
        html = requests.read(int.from_bytes(size, "big")).decode(errors="replace")
        try:
            answer = "+" + inliner.inline(html)
        except css_inline.InlineError as error:
            answer = f"-{error}"
        data = answer.encode(errors="replace")
        answers.write(len(data).to_bytes(4, "big") + data)
        answers.flush()


if __name__ == "__main__":
    main()
