"""`python -m normprop` is the command `normprop`."""

import sys

from normprop.cli import main

sys.exit(main())
