"""`python -m toolkit` is `palimpsest`."""

import sys

from toolkit.cli import main

sys.exit(main())
