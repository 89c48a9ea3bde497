# SPDX-License-Identifier: Apache-2.0
"""A model in this process, loaded by vLLM's own loader, whose weights can be updated by both of
upstream's ways."""

import tiny_llama
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import inplace

from vllm_plugin_tm import machine
from vllm_plugin_tm.updates.engine import BACKEND

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32,
}  # fmt: skip


def plain(architecture, tied=False, sizes=None):
    """A bf16 model of transformers' own saving."""

    def make(path, seed):
        torch.manual_seed(seed)
        more = SIZES | (EXPERTS if architecture == "qwen3_moe" else {}) | (sizes or {})
        config = AutoConfig.for_model(architecture, **more, tie_word_embeddings=tied)
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(path)

    return make


def quantized(kind, activations=None, **how):
    """make(path, seed) for a checkpoint of tiny_llama or tiny_moe."""

    def make(path, seed):
        state = kind.tensors(seed=seed, **{k: v for k, v in how.items() if k != "rounded"})
        how_saved = {key: value for key, value in how.items() if key != "static"}
        if activations is not None:
            how_saved["activations"] = activations
        kind.save(path, state, **how_saved)

    return make


class Served:
    """A model that was loaded from a checkpoint, with what upstream's worker has around it.

    `make` writes the checkpoint of a seed into a folder; `options` are vLLM's."""

    def __init__(self, make, folder, **options):
        self.make, self.folder, self.options = make, folder, options
        self.make(folder / "0", 0)
        self.model = tiny_llama.load(folder / "0", **self.options)
        self.config = tiny_llama.engine_config(folder / "0", **self.options)
        transfer = WeightTransferConfig(backend=BACKEND)
        self.engine = WeightTransferEngineFactory.create_engine(
            transfer, self.config, torch.device("cpu"), self.model
        )
        self.worker = worker(self.config, self.model, self.engine)

    def checkpoint(self, seed):
        self.make(self.folder / str(seed), seed)
        return self.folder / str(seed)

    def update(self, way, path):
        """Upstream's worker does the same with the calls that it gets."""
        if way == "reload":
            self.worker.reload_weights(weights_path=str(path))
            return
        self.worker.start_weight_update()
        self.worker.update_weights({"files": [str(file) for file in path.glob("*.safetensors")]})
        self.worker.finish_weight_update()

    def state(self):
        """Bits and addresses of all parameters and buffers."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {
            name: (tensor.data_ptr(), tensor.dtype, tensor.detach().clone())
            for name, tensor in tensors.items()
        }

    def assert_is(self, state):
        now = self.state()
        assert set(now) == set(state)
        for name, (address, dtype, tensor) in state.items():
            assert now[name][:2] == (address, dtype), name
            assert same(now[name][2], tensor), name

    def assert_loaded_from(self, path):
        """As a fresh load. A fused layer keeps the shape of whichever part comes last."""
        fresh = dict(tiny_llama.load(path, **self.options).named_parameters())
        mine = dict(self.model.named_parameters())
        assert set(fresh) == set(mine)
        for name, tensor in fresh.items():
            assert name.endswith("weight_shape") or same(mine[name], tensor), name

    def assert_there_and_back(self):
        """Updates equal a fresh load, once by each way; tensors stay where they are."""
        first = self.state()
        self.update("session", self.checkpoint(1))
        self.assert_loaded_from(self.folder / "1")
        assert {k: v[0] for k, v in self.state().items()} == {k: v[0] for k, v in first.items()}
        self.update("reload", self.folder / "0")
        self.assert_is(first)


def worker(config, model, engine):
    """An instance of the device's live worker class that has a model and nothing else."""
    from vllm.v1.worker import cpu_worker, gpu_worker

    kind = gpu_worker.Worker if machine.device() == "cuda" else cpu_worker.CPUWorker

    class Runner:
        def get_model(self):
            return model

        def reload_weights(self, *arguments):
            inplace.reload_weights(config, model, *arguments)

        def reset_lora_state(self):
            pass

    one = object.__new__(kind)
    one.__dict__.update(
        vllm_config=config,
        rank=0,
        model_runner=Runner(),
        weight_transfer_engine=engine,
        _weight_update_active=False,
        _weight_update_is_draft=False,
    )
    return one


def same(a, b):
    return torch.equal(a.data.reshape(-1).view(torch.uint8), b.data.reshape(-1).view(torch.uint8))
