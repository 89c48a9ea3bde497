# SPDX-License-Identifier: Apache-2.0
"""What may be asked for: every refusal names the option, its value and what is allowed."""

import pytest

from vllm_plugin_tm.quantization.convert import SCHEMES, ConvertError, Options
from vllm_plugin_tm.quantization.convert.options import parse_bytes, parse_group_size
from vllm_plugin_tm.quantization.support_matrix import CHANNEL


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"scheme": "w3a16"}, "scheme 'w3a16' is not known; allowed are w4a16, w8a16, w4a8"),
        ({"method": "awq"}, "method 'awq' is not known; allowed are rtn, signed, mse, gptq"),
        ({"scheme": "fp8", "method": "mse"}, "method 'mse' does not go with scheme fp8; .* rtn"),
        ({"format": "int-quantized"}, "format 'int-quantized' does not go with scheme w4a16"),
        ({"group_size": 20}, "group size 20 is not allowed; multiples of 8 and channel"),
        ({"group_size": 0}, "group size 0 is not allowed"),
        ({"scheme": "w8a8", "group_size": 32}, "group size 32 does not go with scheme w8a8"),
        ({"scheme": "fp8-block", "group_size": 64}, "group size 64 does not go with scheme fp8-b"),
        ({"scheme": "fp8-block", "group_size": -1}, "group size channel does not go with scheme f"),
        ({"scheme": "fp8-block", "block_size": 256}, "block size 256 .* allowed are 32, 64, 128"),
        ({"scheme": "fp8-block", "block_size": 0}, "block size 0 is not allowed"),
        ({"scheme": "fp8", "block_size": 64}, "block size 64 does not go with scheme fp8; fp8-blo"),
        ({"scales": "ue8m0"}, "scales 'ue8m0' do not go with scheme w4a16; fp8, fp8-block may"),
        ({"scheme": "fp8", "scales": "e8m0"}, "scales 'e8m0' is not known; allowed are float, ue"),
        ({"scheme": "w4a8", "symmetric": False}, "scheme w4a8 has no zero points .*w4a16, w8a16"),
        ({"method": "signed", "symmetric": False}, "'signed' is for symmetric weights"),
        ({"on_indivisible": "pad"}, "on_indivisible 'pad' is not known; .*error, channel, skip"),
        ({"mse_weight": "cube", "method": "mse"}, "mse_weight 'cube' is not known"),
        ({"mse_weight": "square"}, "mse_weight 'square' is for method 'mse', which is 'rtn'"),
        ({"workers": 0}, "workers is 0; a number above zero"),
        ({"max_memory": -1}, "max_memory is -1"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"method": "gptq"}, "method 'gptq' needs a text to calibrate with"),
        ({"calibration": "text"}, "a calibration text is for method 'gptq', not 'rtn'"),
        ({"calibration_samples": 0}, "calibration_samples is 0"),
        ({"ignore": ("re:(",)}, r"pattern 're:\(' is no regular expression"),
        ({"targets": ("*.q_proj",)}, r"pattern '\*.q_proj' is taken as the whole name"),
    ],
)
def test_refusals(how, words):
    with pytest.raises(ConvertError, match=words):
        Options(**{"scheme": "w4a16", **how})


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w4a8", "w8a8", "fp8", "fp8-block"])
def test_defaults(scheme):
    options = Options(scheme)
    grouped = scheme in ("w4a16", "w8a16", "w4a8")
    assert options.weight_group == (32 if grouped else 128 if scheme == "fp8-block" else CHANNEL)
    assert options.weight_format == SCHEMES[scheme].formats[0]


@pytest.mark.parametrize(
    ("text", "size"),
    [("800M", 800_000_000), ("2GiB", 2 << 30), ("1.5g", 1_500_000_000), ("77", 77), ("4 KB", 4000)],
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1G", "1X", "G"])
def test_no_amounts_of_memory(text):
    with pytest.raises(ConvertError, match="is no amount of memory; 800M and 4GiB are"):
        parse_bytes(text)


def test_group_sizes():
    assert parse_group_size("channel") == CHANNEL
    assert parse_group_size("64") == 64
    for text in ("-1", "0", "some", "3.5"):
        with pytest.raises(ConvertError, match="is not a number above zero or channel"):
            parse_group_size(text)
