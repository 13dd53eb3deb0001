"""`python -m ditq_bench.stress`."""

import sys

from ditq_bench.stress.command import main

sys.exit(main())
