"""`python -m ditq_bench`: the bench commands, also where the package is not installed."""

from ditq_bench.cli import bench
from ditq_bench.tune.command import tune

bench.command("tune", hidden=True)(tune)
bench(prog_name="python -m ditq_bench")
