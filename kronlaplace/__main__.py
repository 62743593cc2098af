"""`python -m kronlaplace`: the command line."""

import sys

from kronlaplace.cli import main

sys.exit(main())
