"""`python -m ditq_bench.diffusers_suite`."""

import sys

from ditq_bench.diffusers_suite.command import main

sys.exit(main())
