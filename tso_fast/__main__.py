"""``python -m tso_fast``, as launchers of several processes start it."""

import sys

from tso_fast.cli import main

sys.exit(main())
