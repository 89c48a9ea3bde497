# SPDX-License-Identifier: Apache-2.0
"""The output head of a model, quantized when its 16-bit weights have arrived: `"lm_head": "w8a16"`.

Whatever the rest of the checkpoint is: upstream's models are built with a head of 16 bits, whose
method is replaced before a weight is read.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from vllm_plugin_tm.quantization.convert.options import DEFAULT_GROUP_SIZE, Options
from vllm_plugin_tm.quantization.kernel import TMKernel
from vllm_plugin_tm.quantization.load_check import Layer
from vllm_plugin_tm.quantization.online.fill import fill
from vllm_plugin_tm.quantization.online.options import KEY, LM_HEAD, OnlineError, head_scheme
from vllm_plugin_tm.quantization.online.scheme import compressed, scale_dtype, stored_dtype
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

logger = logging.getLogger("vllm.plugin_tm")

_EMBEDDING = "embed_tokens"
"""What models that have no head call the embedding that gives their logits."""


class HeadMethod(CompressedTensorsLinearMethod):
    """Of a head with weights of its own. It is loaded as `weight` [N, K] of this shard, and then
    becomes that of a compressed-tensors checkpoint."""

    def __init__(self, name: str, layer: Any, scheme: str, stored: torch.dtype | None) -> None:
        """Raises OnlineError where no kernel of ours would take the layer's matrix."""
        self.name, self.tm_note = name, f"lm_head {scheme}, quantized while loading"
        self._stored = stored
        n, k = layer.weight.shape
        self._group_size = CHANNEL if k % DEFAULT_GROUP_SIZE else DEFAULT_GROUP_SIZE
        self._options = Options(scheme, self._group_size, lm_head=True)
        self._arguments = (k, [n], k, layer.num_embeddings_padded, layer.weight.dtype)
        config = compressed(self._options, self._group_size, name)
        super().__init__(config)
        layer.scheme = config.get_scheme(layer=layer, layer_name=name)
        # A rehearsal: what no kernel runs is refused now, and not when the model is loaded.
        with torch.device("meta"):
            rehearsal: Any = torch.nn.Module()
            rehearsal.scheme = layer.scheme
            try:
                super().create_weights(rehearsal, *self._arguments, weight_loader=None)
            except ValueError as error:
                raise OnlineError(f"{name}: {KEY}.{LM_HEAD} is {scheme!r}: {error}") from None
        if not isinstance(layer.scheme.kernel, TMKernel):
            raise OnlineError(
                f"{name}: {KEY}.{LM_HEAD} is {scheme!r}, but vLLM chose "
                f"{type(layer.scheme.kernel).__name__}; only kernels of vllm-plugin-tm are allowed"
            )
        # Rows that pad the vocabulary are in no checkpoint, and an update must not wait for them.
        rows = layer.num_org_embeddings_per_partition + layer.num_added_embeddings_per_partition
        weight = get_layerwise_info(layer).restore_metadata[0]["weight"]
        vars(weight)["weight_loader_numel"] = rows * k

    def loaded(self, name: str, module: torch.nn.Module) -> Layer:
        """What a checkpoint must fill."""
        sources = ((name, self._arguments[1][0]),)
        return Layer(name, module, ("weight",), sources, late_bias=True)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantizes `weight` and has the scheme process what comes of it.

        Raises OnlineError for weights that are no finite numbers.
        """
        weight = self._weight(layer)
        super().create_weights(layer, *self._arguments, weight_loader=layer.weight_loader)
        parts = {name: param.data for name, param in layer.named_parameters(recurse=False)}
        dtype = scale_dtype(weight.dtype, self._stored)
        group, name = self._group_size, self.name
        fill(parts, [(0, weight)], group, self._options, dtype, split=False, layer=name)
        del weight
        super().process_weights_after_loading(layer)

    def _weight(self, layer: Any) -> Tensor:
        """The loaded weights, which the layer does not keep."""
        weight: Tensor = layer._parameters.pop("weight").data
        return weight


class TableMethod(HeadMethod):
    """Of an embedding that is a head too: its tokens are looked up in the table that was loaded,
    logits are made with a quantized copy of it."""

    borrowed = False
    """Whether the model has a head beside it, which the layer table then names."""

    def embedding(self, layer: torch.nn.Module, input_: Tensor) -> Tensor:
        """Rows input_ [...] of the table: [..., K]."""
        return torch.nn.functional.embedding(input_, layer.weight)  # type: ignore[arg-type]

    def _weight(self, layer: Any) -> Tensor:
        weight: Tensor = layer.weight.data
        return weight


class TiedHeadMethod(QuantizeMethodBase):
    """Of a head whose weights are an embedding's, which has the copy that logits are made with."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def create_weights(self, layer: torch.nn.Module, *_args: Any, **_kwargs: Any) -> None:
        """Nothing: the head was created, and tied, before."""

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] times the copy plus bias [N]: [..., N]."""
        logits: Tensor = self.table.quant_method.apply(self.table, x, bias)
        return logits


def quantize_head(model: torch.nn.Module, vllm_config: Any, model_config: Any) -> None:
    """Has the head of a model that was just created quantized when it is loaded, if the options in
    the VllmConfig's additional_config say so.

    Raises OnlineError, before a weight is read, for wrong options, for models without a head, and
    for heads that are quantized already, that vLLM wants as they are, or that no kernel of ours
    takes.
    """
    scheme = head_scheme(vllm_config.additional_config)
    if scheme is None or not get_pp_group().is_last_rank:
        return
    option = f"{KEY}.{LM_HEAD} is {scheme!r}"
    if model_config.runner_type == "draft":
        logger.info("%s: the draft model's head is left as it is", option)
        return
    heads = _heads(model, model_config)
    if model_config.runner_type == "pooling" or not heads:
        raise OnlineError(
            f"{option}, but {type(model).__name__} (runner {model_config.runner_type}) has no "
            "output head; leave the option out"
        )
    if model_config.head_dtype != model_config.dtype:
        raise OnlineError(
            f"{option}, but head_dtype is {model_config.head_dtype} and the model's dtype "
            f"{model_config.dtype}; vLLM gives only heads of 16 bits another type. Drop one"
        )
    for name, head in heads:
        _refuse_quantized(option, name, head)
        owner_name, owner = _owner(model, name, head)
        if isinstance(owner, ParallelLMHead) and vllm_config.lora_config is not None:
            raise OnlineError(
                f"{option}, but vLLM's --enable-lora asks {name} for weights of 16 bits, which "
                "only a head that is tied to the embedding keeps. Drop one"
            )
        if not isinstance(owner.quant_method, TableMethod):
            _refuse_quantized(option, owner_name, owner)
            kind = HeadMethod if isinstance(owner, ParallelLMHead) else TableMethod
            owner.quant_method = kind(owner_name, owner, scheme, stored_dtype(model_config))
        if owner is not head:
            owner.quant_method.borrowed = True
            head.quant_method = TiedHeadMethod(owner)


def refuse_left(model: torch.nn.Module, vllm_config: Any) -> None:
    """Raises OnlineError where a loaded model's head was to be quantized and is not: some of vLLM's
    loaders are not this package's."""
    scheme = head_scheme(vllm_config.additional_config)
    if scheme is None or not get_pp_group().is_last_rank:
        return
    if not any(isinstance(getattr(m, "quant_method", None), HeadMethod) for m in model.modules()):
        raise OnlineError(
            f"{KEY}.{LM_HEAD} is {scheme!r}, but vLLM's loader of --load-format "
            f"{vllm_config.load_config.load_format} left the head as it was; allowed are auto, "
            "safetensors, dummy and what else reads a checkpoint's files. Leave the option out"
        )


def _heads(model: torch.nn.Module, model_config: Any) -> list[tuple[str, Any]]:
    """The layers that logits are made with, each with its name."""
    modules = dict(model.named_modules())
    heads = [(name, each) for name, each in modules.items() if isinstance(each, ParallelLMHead)]
    tied = getattr(model_config.hf_text_config, "tie_word_embeddings", False)
    if heads or not tied or not any(isinstance(m, LogitsProcessor) for m in modules.values()):
        return heads
    # Models that are always tied (Gemma 2, Cohere) have none.
    tables = [
        (name, each)
        for name, each in modules.items()
        if isinstance(each, VocabParallelEmbedding) and name.rpartition(".")[2] == _EMBEDDING
    ]
    return tables if len(tables) == 1 else []


def _owner(model: torch.nn.Module, name: str, head: Any) -> tuple[str, Any]:
    """The embedding that the head is tied to, or the head."""
    for other, module in model.named_modules():
        if not isinstance(module, VocabParallelEmbedding) or isinstance(module, ParallelLMHead):
            continue
        if getattr(module, "weight", None) is getattr(head, "weight", module):
            return other, module
    return name, head


def _refuse_quantized(option: str, name: str, layer: Any) -> None:
    method = layer.quant_method
    if not isinstance(method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
        what = type(getattr(layer, "scheme", None) or method).__name__
        raise OnlineError(
            f"{option}, but {name} of this checkpoint is quantized already ({what}); heads with "
            "weights of 16 bits are allowed. Leave the option out"
        )
