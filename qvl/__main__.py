"""`python -m qvl` is the `qvl` command."""

import sys

from qvl.commands.cli import main

sys.exit(main())
