"""`python -m qmpvcpu` is the command `qmpvcpu`."""

import sys

from qmpvcpu.cli import main

sys.exit(main())
