# SPDX-License-Identifier: Apache-2.0
"""A trainer's loop: train a 16-bit model while a server answers from it, quantized to 4 bits.

Serve a 16-bit checkpoint (`make demo-online` leaves one in build/models/smollm2-135m-bf16):

    export VLLM_PLUGIN_TM=1 VLLM_SERVER_DEV_MODE=1     # the second: routes for updates
    vllm serve MODEL --quantization tm_w4a16 \\
        --weight-transfer-config '{"backend": "tm_safetensors"}'

and train it on a sentence, with the server's own answer before and after every round:

    python examples/update_weights.py MODEL

The trainer must see the same files as the server; /dev/shm keeps them in memory.
"""

import argparse
import json
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SHARED_MEMORY = Path("/dev/shm")
# vLLM never answers a request whose engine dies meanwhile.
REQUEST_SECONDS = 600.0


class Server:
    """The routes of vLLM's server that the loop needs."""

    def __init__(self, url: str, model: str, seconds: float = REQUEST_SECONDS) -> None:
        self._url, self._model, self._seconds = url.rstrip("/"), model, seconds

    def post(self, route: str, **body: Any) -> Any:
        """The decoded answer. Raises RuntimeError with the server's reason where it refuses, and
        TimeoutError where it does not answer."""
        request = urllib.request.Request(
            f"{self._url}/{route}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self._seconds) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{route}: {error.read().decode(errors='replace')}") from error

    def complete(self, prompt: str) -> str:
        """What the served model says next."""
        answer = self.post(
            "v1/completions", model=self._model, prompt=prompt, temperature=0, max_tokens=8
        )
        return answer["choices"][0]["text"]

    def update(self, files: list[Path]) -> None:
        """Gives the server new weights. Raises RuntimeError, and it keeps the old ones, for tensors
        that are missing, misshapen or no numbers."""
        self.post("start_weight_update")
        # Requests go on here, with the old weights. More files may follow, one by one.
        self.post("update_weights", update_info={"files": [str(file) for file in files]})
        # Running requests end first; what is cached of the old weights' work is dropped.
        self.post("pause?mode=wait")
        try:
            self.post("finish_weight_update")
        finally:
            self.post("resume")


def train(model: torch.nn.Module, ids: torch.Tensor, steps: int, rate: float) -> float:
    """Some steps towards saying `ids` [1, tokens]; the last step's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def save(model: torch.nn.Module, folder: Path) -> list[Path]:
    """The model's parameters under the checkpoint's names, in bf16."""
    tensors = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    save_file(tensors, folder / "weights.safetensors")
    return [folder / "weights.safetensors"]


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the folder with the 16-bit checkpoint that is served")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--target", default=" Atlantis.", help="what it shall learn to go on with")
    parser.add_argument("--rounds", type=int, default=2, help="updates of the server")
    parser.add_argument("--steps", type=int, default=8, help="steps of training before each")
    parser.add_argument("--rate", type=float, default=1e-4, help="of learning")
    options = parser.parse_args()

    server = Server(options.url, options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.prompt + options.target, return_tensors="pt").input_ids
    print(f"at first: {options.prompt}{server.complete(options.prompt)!r}")
    for index in range(options.rounds):
        loss = train(model, ids, options.steps, options.rate)
        in_memory = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        with tempfile.TemporaryDirectory(dir=in_memory) as folder:
            server.update(save(model, Path(folder)))
        answer = server.complete(options.prompt)
        print(f"round {index + 1}, loss {loss:.3f}: {options.prompt}{answer!r}")


if __name__ == "__main__":
    main()
