"""`python -m normprop` is the command `normprop`."""

import sys

from normprop.lab.commands import main

sys.exit(main())
