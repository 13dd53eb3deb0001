"""`ditq bench launches`: what is counted in generated code, and that the committed counts are what it gives."""

import csv
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

from ditq_bench.compiled.count import launches
from ditq_bench.compiled.table import table

ROOT = Path(__file__).parents[2]
COUNTED = ROOT / "bench" / "results" / "launches.csv"
MOST = {  # launches of a block, by the backend
    "DiT": 14, "SD3": 19, "Flux double": 19, "Flux single": 7, "Wan": 21, "Qwen-Image": 40,
}  # fmt: skip

GENERATED = '''
triton_poi_fused_add_0 = async_compile.triton("""
def call(inner):
    triton_poi_fused_never.run(1)
""")
def call(args):
    arg0_1, = args
    with torch.cuda._DeviceGuard(0):
        buf0 = empty_strided_cuda((2, 128), (128, 1), torch.int8)
        triton_poi_fused_add_0.run(arg0_1, buf0, 256, stream=stream0)
        # Topologically Sorted Source Nodes: [codes], Original ATen: [ditq.gemm_w8a8]
        buf1 = torch.ops.ditq.gemm_w8a8.default(buf0, arg0_1)
        assert_size_stride(buf1, (2, 128), (128, 1), 'torch.ops.ditq.gemm_w8a8.default')
        buf2 = buf1
        extern_kernels.addmm(arg0_1, buf2, buf2, alpha=1, beta=1, out=buf0)
        buf3 = reinterpret_tensor(buf0, (1, 256), (256, 1), 0)
        triton_per_fused_combo_1.run(buf3, 1, stream=stream0)
    return (buf3, )
'''


def rows():
    with COUNTED.open(newline="", encoding="utf-8") as file:
        return {(row["block"], row["way"]): row for row in csv.DictReader(file)}


def test_kernels_and_operators_are_counted_where_they_run():
    assert launches(GENERATED) == {"triton": 2, "ditq.gemm_w8a8": 1, "addmm": 1}


def test_the_documented_table_is_the_file():
    documented = (ROOT / "docs" / "performance.md").read_text()
    assert "\n".join(table(COUNTED)) in documented


def test_every_block_was_counted():
    found = {block: int(rows()[block, "ditq"]["launches"]) for block in MOST}
    assert found == {block: min(found[block], most) for block, most in MOST.items()}
    assert all(
        int(row["launches"]) == sum(int(row[part]) for part in ("of ditq", "of Inductor", "others"))
        for row in rows().values()
    )


def test_the_command_counts_what_the_file_says():
    """One block, another each day, in a process of its own: it lets torch believe in a GPU."""
    block = sorted(MOST)[datetime.date.today().toordinal() % len(MOST)]
    paths = [str(ROOT / room) for room in (".", "kernels", "converters", "bench")]
    run = "import sys; from ditq_bench.cli import bench; bench(sys.argv[1:])"
    asked = ["launches", "--blocks", block, "--ways", "ditq", "--json"]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", run, *asked],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["rows"]
    counted = ("block", "way", "launches", "of ditq", "of Inductor", "others")
    assert {name: row[name] for name in counted} == {
        name: rows()[block, "ditq"][name] for name in counted
    }
