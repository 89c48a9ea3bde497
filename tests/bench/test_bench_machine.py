# SPDX-License-Identifier: Apache-2.0
"""machine.py on made-up files of the system."""

from vllm_plugin_tm.bench import machine


def _cache(root, cpu, index, level, size, shared):
    directory = root / f"cpu{cpu}" / "cache" / f"index{index}"
    directory.mkdir(parents=True)
    (directory / "level").write_text(f"{level}\n")
    (directory / "shared_cpu_list").write_text(f"{shared}\n")
    if size:
        (directory / "size").write_text(f"{size}\n")


def test_shared_cache_counts_once_and_separate_ones_add_up(tmp_path):
    for cpu in (0, 1):
        _cache(tmp_path, cpu, 0, 2, "1024K", str(cpu))
        _cache(tmp_path, cpu, 1, 3, "32768K", "0-1")
    _cache(tmp_path, 2, 1, 3, "16M", "2-3")
    assert machine.llc_bytes([0, 1], tmp_path) == 32 * 2**20
    assert machine.llc_bytes([0, 1, 2], tmp_path) == 48 * 2**20


def test_cache_without_size_is_unknown(tmp_path):
    _cache(tmp_path, 0, 0, 3, "", "0")
    assert machine.llc_bytes([0], tmp_path) is None
    assert machine.llc_bytes([0], tmp_path / "nothing") is None


def test_cpuinfo_takes_the_first_processor():
    text = "processor : 0\nmodel name\t: A: B\nflags : avx2 fma\n\nprocessor : 1\nmodel name : C\n"
    assert machine.cpuinfo(text)["model name"] == "A: B"


def test_this_machine_is_described():
    here = machine.describe(threads=1)
    assert here.threads == 1
    assert here.cpus >= 1
    assert here.llc_bytes > 0
    assert "python" in here.versions
    assert here.cpu in here.summary
