"""Importing `ditq_runtime` loads nothing heavy, and diffusers knows ditq whichever is imported first."""

import subprocess
import sys

import pytest

KNOWN = """
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.quantizers import auto
assert "ditq" in auto.AUTO_QUANTIZER_MAPPING
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["ditq"].__init__ is not None
assert "ditq_int8" in {name.value for name in AttentionBackendName}
"""
ORDERS = {
    "ours first": "import sys, ditq_runtime\nassert 'torch' not in sys.modules\nimport diffusers\n",
    "theirs first": "import diffusers, ditq_runtime\n",
    "a part of ours": "import ditq_runtime.families\n",
    "theirs, inside a part of ours": "from ditq_runtime.layers.linear import QuantLinear\nimport diffusers\n",
    "a command of ours": "from ditq_runtime.cli import app\napp.run(['--version'])\nimport diffusers\n",
}


@pytest.mark.parametrize("order", ORDERS)
def test_diffusers_knows_ditq(order):
    done = subprocess.run(
        [sys.executable, "-c", ORDERS[order] + KNOWN], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_command_line_loads_no_torch():
    program = (
        "import sys\nfrom ditq_runtime.cli.app import run\n"
        "assert run(['--help']) == 0 and run(['sample', '--nope']) == 2\n"
        "assert run('convert demo:digits out --weights w5'.split()) == 2\n"
        "heavy = {'torch', 'diffusers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
