"""``python -m mailerq`` is the program ``mailerq``."""

import sys

from mailerq.cli import main

sys.exit(main())
