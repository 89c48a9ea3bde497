# SPDX-License-Identifier: Apache-2.0
"""Routed experts that we decline go to upstream as if we were not there; those that we take are
refused by upstream alone."""

import pytest
import torch

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from experts_cases import FORMATS, SOME, Format, Layer, make_method, method_class, moe_config

from vllm_plugin_tm import envs, layer_table
from vllm_plugin_tm.quantization.experts_method import TMExpertsMethod

pytestmark = pytest.mark.usefixtures("patched")

W4A8 = Format("W4A8Int8", 4, 32)


def test_upstream_alone_has_no_kernel_for_them():
    """It has kernels for AMX only, and tests/conftest.py hides that from it."""
    from vllm_plugin_tm.patch import apply

    apply.remove()
    for form in FORMATS:
        assert not issubclass(method_class(form.method), TMExpertsMethod)
        with pytest.raises((NotImplementedError, ValueError), match="supports the deployment"):
            make_method(form, moe_config())


@pytest.mark.parametrize("form", SOME, ids=str)
@pytest.mark.parametrize(
    ("activation", "schemes", "reason"),
    [
        ("relu2", "", r"activation \(relu2\) not supported"),
        ("silu", "{others}", "{scheme} is not among the schemes to take"),
    ],
)
def test_upstreams_refusal_carries_our_reason(monkeypatch, form, activation, schemes, reason):
    others = ",".join(scheme for scheme in envs.SCHEMES if scheme != form.scheme)
    monkeypatch.setenv(envs.TAKEN_SCHEMES.name, schemes.format(others=others))
    words = rf"supports the deployment.*vllm-plugin-tm: {reason.format(scheme=form.scheme)}"
    with pytest.raises(NotImplementedError, match=f"(?s){words}"):
        make_method(form, moe_config(activation=activation))


@pytest.mark.parametrize(
    ("form", "fields", "reason"),
    [
        (FORMATS[-1], {"strategy": "tensor", "dynamic": False}, "activations per tensor"),
        (FORMATS[-1], {"symmetric": False}, "zero points of weights or activations"),
        (W4A8, {"symmetric": False}, "zero points of weights or activations"),
    ],
)
def test_activations_that_no_kernel_rounds_are_declined(form, fields, reason):
    with pytest.raises((NotImplementedError, ValueError), match=rf"vllm-plugin-tm: .*{reason}"):
        make_method(form, moe_config(), **fields)


def test_shards_that_end_inside_a_word_are_declined():
    config = moe_config(tp=2, intermediate_size=24)
    with pytest.raises(NotImplementedError, match=r"w2: the input size of a shard of 24 \(12\)"):
        make_method(Format("WNA16", 4), config)


@pytest.mark.parametrize("form", SOME, ids=str)
def test_where_upstream_has_experts_for_amx_the_layer_is_ours(monkeypatch, form):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert make_method(form, moe_config()).kernel is not None


class Upstream:
    """A method of upstream's that can: says what it was asked."""

    supports_eplb = True

    def __init__(self, *arguments):
        self.asked = [("constructed", *arguments)]

    def process_weights_after_loading(self, layer):
        self.asked.append(("processed", layer))

    def get_fused_moe_quant_config(self, layer):
        return ("configuration", layer)

    def apply(self, *arguments):
        return arguments


@pytest.mark.parametrize("form", SOME, ids=str)
def test_a_layer_that_we_decline_is_upstreams_whole(form):
    """Every call that our class answers goes on to upstream's, with the same arguments."""
    mixin = method_class(form.method).__bases__[0]
    cls = type("Method", (mixin, Upstream), {})
    weights = object()

    class Declines(cls):
        def _request(self, weight_quant, input_quant, moe):
            return "for a reason"

    method = Declines(weights, None, "moe")
    assert (method.kernel, method.note) == (None, "for a reason")
    assert method.asked == [("constructed", weights, None, "moe", None)]
    method.process_weights_after_loading("layer")
    assert method.asked[1:] == [("processed", "layer")]
    assert method.get_fused_moe_quant_config("layer") == ("configuration", "layer")
    assert method.apply(*"abcdef") == tuple("abcdef")
    assert method.supports_eplb
    assert layer_table.tm_kernel_of(module_with(method)) is None


def module_with(method):
    module = torch.nn.Module()
    module.quant_method = method
    return module


@pytest.mark.parametrize("form", SOME, ids=str)
def test_what_upstream_asks_of_a_layer_of_ours(form):
    method = make_method(form, moe_config())
    assert method.get_fused_moe_quant_config(Layer(method.moe)) is None
    assert not method.supports_eplb
    assert not method.is_monolithic
    # The loader looks at the name.
    assert type(method).__name__ == type(method).__bases__[-1].__name__
