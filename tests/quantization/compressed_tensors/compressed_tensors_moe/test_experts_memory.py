# SPDX-License-Identifier: Apache-2.0
"""Packing a layer of many experts needs memory for a few of them, not for the layer twice."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)
if "VmHWM" not in Path("/proc/self/status").read_text():
    pytest.skip("this kernel does not tell a process's peak memory", allow_module_level=True)

pytestmark = pytest.mark.slow

EXPERTS, HIDDEN, INTERMEDIATE = 64, 1024, 768
WEIGHTS = 3 * HIDDEN * INTERMEDIATE  # of an expert

# Prints KiB: resident before, the peak while processing, resident after. The second run counts:
# the first one has started threads and faulted in code.
CHILD = """
import gc, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import torch
torch.set_num_threads(1)
from vllm_plugin_tm.patch import apply
apply.apply()
import experts_cases as cases

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

def run(experts, report):
    config = cases.moe_config(
        num_experts=experts, num_local_experts=experts, num_logical_experts=experts,
        hidden_dim={hidden}, intermediate_size={intermediate},
    )
    form = cases.Format({method!r}, {bits}, {group})
    method = cases.make_method(form, config)
    layer = cases.Layer(config)
    cases.create(method, layer)
    for product in ("w13", "w2"):
        getattr(layer, product + "_" + form.codes).data.fill_(1)
    gc.collect()
    before = memory("VmRSS")
    if report and memory("VmHWM") > before + 4096:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    method.process_weights_after_loading(layer)
    peak = memory("VmHWM")
    gc.collect()
    if report:
        print(before, peak, memory("VmRSS"))

run(2, False)
run({experts}, True)
"""


@pytest.mark.parametrize(
    ("method", "bits", "group", "on_disk", "packed"),
    [
        ("WNA16", 4, 32, WEIGHTS // 2, WEIGHTS // 2),
        ("W4A8Int8", 4, 32, WEIGHTS, WEIGHTS // 2),
        ("W8A8Int8", 8, -1, WEIGHTS, WEIGHTS),
    ],
)
def test_memory_grows_by_a_few_experts_and_the_disk_tensors_are_given_back(
    method, bits, group, on_disk, packed
):
    code = CHILD.format(
        folder=str(Path(__file__).parent),
        experts=EXPERTS,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        method=method,
        bits=bits,
        group=group,
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    before, peak, after = (int(word) * 1024 for word in process.stdout.split()[-3:])
    # An expert's tensors and their packed form; a huge page of each of four growing tensors; page
    # tables and the allocator's own. The layer twice would be 64 experts more.
    allowed = 4 * (on_disk + packed) + 4 * (2 << 20)
    assert allowed < EXPERTS * packed / 3
    assert peak - before <= allowed, f"{(peak - before) / on_disk:.1f} experts"
    assert after - before <= EXPERTS * (packed - on_disk) + allowed
