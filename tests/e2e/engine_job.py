# SPDX-License-Identifier: Apache-2.0
"""A child process of the end-to-end tests: runs vLLM engines as a JSON job says, saves results.

Usage: engine_job.py JOB.json RESULT.pt. JOB is a list of engines, one after the other:
  engine   arguments of vllm.LLM
  prompts  lists of token ids; for each: greedy tokens, log-probabilities of the whole vocabulary
  tokens   how many to generate (1 when absent)
  reloads  checkpoints to load into the running engine, each followed by the prompts
  updates  after these, updates that may be refused, each followed by the prompts: {"reload": path},
           or {"session": lists of files}, with the prompts also before it is finished
  again    how often the last two of the reloads are repeated without prompts, for memory figures
  workers  true: what every worker says of its process, patches and layers
  modules  true: name -> (scheme, kernel) of every module with a method of quantization
  spawn    true: workers are new processes, as vLLM makes them on a CPU; otherwise they are forks
           of this one, which saves them the 16 s of a core that importing vLLM takes each
  fails    true: the engine is not to start; `refused` is all that comes back, what it said
  layers   true: x and y of every quantized linear layer, and x, weights and numbers of the chosen
           experts and y of quantized experts, for the first prompt (eager engines only)
  likelihood  token ids: the log-probability of each but the first, given those before it
RESULT is a list of dicts, see _run. `tensors` are hashes of all parameters of the model.
"""

import functools
import gc
import hashlib
import json
import multiprocessing
import os
import sys
from typing import Any

import torch


def _hashes(model: torch.nn.Module) -> dict[str, str]:
    """Name, shape, dtype, address and content of every parameter."""
    return {
        name: f"{tuple(p.shape)} {p.dtype} "
        + hashlib.sha256(p.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, p in model.named_parameters()
    }


def _addresses(model: torch.nn.Module) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters()}


def _worker(_worker: Any) -> dict[str, Any]:
    """Runs in every worker."""
    from vllm_plugin_tm import layer_table
    from vllm_plugin_tm.patch import apply

    return {
        "pid": os.getpid(),
        "patches": [str(row) for row in apply.status()],
        "layers": [(row.kernel, row.on_tm, row.count) for row in layer_table.last()],
        "schemes": [row.scheme for row in layer_table.last()],
        "threads": torch.get_num_threads(),
    }


def _modules(model: torch.nn.Module) -> dict[str, tuple[str, str]]:
    """The layer table, a row for each module."""
    from vllm_plugin_tm import layer_table

    rows = {name: layer_table.collect(module) for name, module in model.named_modules()}
    # A module's own row is that of the empty name, the others are its children's.
    own = {name: row for name, found in rows.items() for row in found if not row.example}
    return {name: (row.scheme, row.kernel) for name, row in own.items()}


_seen: dict[str, tuple[torch.Tensor, ...]] = {}


def _watch(model: torch.nn.Module) -> None:
    """Keeps the first input and output of every layer that has a quantization scheme or a kernel of
    ours. Experts are no module that is called: their method is."""
    from vllm_plugin_tm import layer_table

    def hook(name: str) -> Any:
        def keep(_module: Any, args: tuple[Any, ...], output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            _seen.setdefault(name, (args[0].detach().clone(), y.detach().clone()))

        return keep

    def keeping(name: str, forward: Any) -> Any:
        def run(x: torch.Tensor, topk_weights: Any, topk_ids: Any, **more: Any) -> Any:
            kept = [t.detach().clone() for t in (x, topk_weights, topk_ids)]
            y = forward(x=x, topk_weights=topk_weights, topk_ids=topk_ids, **more)
            _seen.setdefault(name, (*kept, y.detach().clone()))
            return y

        return run

    for name, module in model.named_modules():
        ours = layer_table.tm_kernel_of(module) is not None
        if ours and hasattr(module, "forward_modular"):
            module.forward_modular = keeping(name, module.forward_modular)
        elif ours or getattr(module, "scheme", None) is not None:
            module.register_forward_hook(hook(name))


def _likelihood(llm: Any, tokens: list[int]) -> torch.Tensor:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    rows = zip(tokens[1:], answer.prompt_logprobs[1:], strict=True)
    return torch.tensor([entry[token].logprob for token, entry in rows])


def _resident() -> int:
    """Bytes of this process in memory now."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def _ask(llm: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        prompt_logprobs=-1,
        logprobs=-1,
        detokenize=False,
        ignore_eos=True,
    )
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
    )

    def row(entry: dict[int, Any]) -> torch.Tensor:
        values = torch.full((len(entry),), float("nan"))
        for token, logprob in entry.items():
            values[token] = logprob.logprob
        return values

    return {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        # Row i: the distribution of the token after prompt token i.
        "logprobs": [
            torch.stack([row(entry) for entry in (*answer.prompt_logprobs[1:], first)])
            for answer in answers
            for first in answer.outputs[0].logprobs[:1]
        ],
    }


def _update(llm: Any, how: dict[str, Any], prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """What the prompts gave before the end of the update, and why it was refused (or None)."""
    result: dict[str, Any] = {"during": None, "refused": None}
    try:
        if "reload" in how:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": how["reload"]})
            return result
        llm.start_weight_update()
        for files in how["session"]:
            llm.update_weights({"update_info": {"files": files}})
        result["during"] = _ask(llm, prompts, tokens)
        llm.finish_weight_update()
    except Exception as error:
        result["refused"] = str(error)
    return result


def _start_workers(spawn: bool) -> None:
    from vllm.utils.system_utils import get_mp_context
    from vllm.v1.executor import multiproc_executor

    forks = functools.partial(multiprocessing.get_context, "fork")
    multiproc_executor.get_mp_context = get_mp_context if spawn else forks


def _refusal(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        LLM(**job["engine"])
    except Exception as error:
        cleanup_dist_env_and_memory()
        return {"refused": f"{type(error).__name__}: {error}"}
    raise AssertionError(f"{job['engine']['model']} was not refused")


def _run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    _start_workers(job.get("spawn", False))
    if job.get("fails"):
        return _refusal(job)
    llm = LLM(**job["engine"])
    prompts, tokens = job["prompts"], job.get("tokens", 1)
    if job.get("layers"):
        _seen.clear()  # warming up has run the model on made-up tokens
        llm.apply_model(_watch)
    result = {"answers": [_ask(llm, prompts, tokens)]}
    single = job["engine"].get("tensor_parallel_size", 1) == 1
    if single:
        result["tensors"] = llm.apply_model(_hashes)
        result["addresses"] = llm.apply_model(_addresses)
    for path in job.get("reloads", ()):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        result["answers"].append(_ask(llm, prompts, tokens))
        result["tensors"] += llm.apply_model(_hashes)
        result["addresses"] += llm.apply_model(_addresses)
    result["updates"] = []
    for how in job.get("updates", ()):
        step = _update(llm, how, prompts, tokens)
        result["updates"].append(step | {"answers": _ask(llm, prompts, tokens)})
        if single:
            result["updates"][-1]["tensors"] = llm.apply_model(_hashes)[0]
    result["resident"] = []
    for _ in range(job.get("again", 0)):
        for path in job["reloads"][-2:]:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        result["resident"].append(_resident())
    if job.get("layers"):
        result["layers"] = dict(_seen)
    if job.get("modules"):
        (result["modules"],) = llm.apply_model(_modules)
    if job.get("likelihood"):
        result["likelihood"] = _likelihood(llm, job["likelihood"])
    if job.get("workers"):
        result["workers"] = llm.collective_rpc(_worker)
    config = llm.llm_engine.vllm_config.compilation_config
    result["compilation"] = config.mode.name
    del llm
    cleanup_dist_env_and_memory()
    return result


def _keep_imports_out_of_collections() -> None:
    """vLLM collects garbage eight times per engine, over all that was ever imported: most of a
    tiny engine's time. What is there now is left out, also when vLLM thaws it at the end."""
    gc.freeze()
    gc.unfreeze = lambda: None


def main() -> None:
    """Runs the job; an engine that fails ends the process with vLLM's traceback."""
    _keep_imports_out_of_collections()
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    torch.save([_run(job) for job in jobs], sys.argv[2])


if __name__ == "__main__":
    main()
