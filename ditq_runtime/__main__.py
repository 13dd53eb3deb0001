"""`python -m ditq_runtime` is `ditq`."""

from ditq_runtime.cli.app import main

main()
