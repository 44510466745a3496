"""A model that answers: loads weights from a directory, says when its first token is there, then gives more of them.

    python model_server.py build DIR --models Qwen2.5-0.5B    random weights, from a seed, saved as DIR/MODEL
    python model_server.py serve DIR/MODEL --socket PATH      loads them, prints "ready {...}", serves

Needs PyTorch and transformers; ``--device cpu`` for a machine without a GPU. On the socket each line is a request:
``token`` is answered with the first token after a fixed prompt, computed on the GPU, ``digest`` with a digest of all
weights in VRAM. Started by ``cold_start.py``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_digest import digest

PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A published configuration of the Qwen2 architecture, embeddings tied. ``parameters`` checks all of it."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    parameters: int


MODELS = {
    "Qwen2.5-0.5B": Model(
        hidden=896,
        intermediate=4864,
        layers=24,
        heads=14,
        key_value_heads=2,
        vocabulary=151936,
        parameters=494_032_768,
    ),
    "Qwen2.5-1.5B": Model(
        hidden=1536,
        intermediate=8960,
        layers=28,
        heads=12,
        key_value_heads=2,
        vocabulary=151936,
        parameters=1_543_714_304,
    ),
    "tiny": Model(  # for rehearsals
        hidden=64,
        intermediate=128,
        layers=2,
        heads=4,
        key_value_heads=2,
        vocabulary=1024,
        parameters=139_840,
    ),
}


def since_start_ms() -> float:
    """Since this process was started, as the kernel has it (to 10 ms)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return round((time.clock_gettime(time.CLOCK_BOOTTIME) - started_s) * 1000, 1)


def build(directory: Path, names: list[str], device: str) -> None:
    """Makes the models that are not there yet, whole or not at all, each as ``directory/NAME``.

    Imports all that serving does, whatever is there: the next import finds it in the page cache.
    """
    torch: Any = importlib.import_module("torch")
    torch.set_default_dtype(torch.bfloat16)
    transformers: Any = importlib.import_module("transformers")
    assert transformers.Qwen2ForCausalLM is not None  # it is imported when it is named
    for name in names:
        if not (directory / name).exists():
            made = random_model(torch, transformers, name, device)
            made.save_pretrained(directory / f"{name}.part")
            (directory / f"{name}.part").rename(directory / name)
            print(f"built {name}: {made.num_parameters()} parameters", flush=True)
            del made


def random_model(torch: Any, transformers: Any, name: str, device: str) -> Any:
    """The model on ``device``, in the default type. Raises SystemExit where it is not of the published size."""
    model = MODELS[name]
    config = transformers.Qwen2Config(
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.key_value_heads,
        vocab_size=model.vocabulary,
        tie_word_embeddings=True,
        rope_theta=1e6,
        max_position_embeddings=32768,
        dtype="bfloat16",
    )
    torch.manual_seed(1)
    with torch.device(device):
        made = transformers.Qwen2ForCausalLM(config)
    if made.num_parameters() != model.parameters:
        raise SystemExit(
            f"{name} has {made.num_parameters()} parameters instead of {model.parameters}"
        )
    return made


class Server:
    def __init__(self, directory: Path, device: str) -> None:
        self.times_ms: dict[str, float] = {}
        self.torch: Any = importlib.import_module("torch")
        from_transformers: Any = importlib.import_module("transformers").Qwen2ForCausalLM
        self.times_ms["imported"] = since_start_ms()
        made = from_transformers.from_pretrained(directory, dtype=self.torch.bfloat16)
        self.model = made.to(device).eval()
        self.prompt = self.torch.arange(1, PROMPT_TOKENS + 1, device=device).unsqueeze(0)
        if device == "cuda":
            self.torch.cuda.synchronize()
        self.times_ms["loaded"] = since_start_ms()

    def token(self) -> int:
        """The likeliest token after the prompt: one pass over all layers, and the answer is on the host."""
        with self.torch.inference_mode():
            return int(self.model(self.prompt).logits[0, -1].argmax())

    def answer(self, request: str) -> str:
        if request == "token":
            return str(self.token())
        if request == "digest":
            return digest(self.torch, self.model.parameters())
        return f"no such request: {request}"


def serve(directory: Path, address: Path, device: str) -> None:
    server = Server(directory, device)
    token = server.token()
    server.times_ms["first_token"] = since_start_ms()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        print("ready " + json.dumps({"token": token} | server.times_ms), flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as lines:
                for line in lines:
                    lines.write(server.answer(line.strip()) + "\n")
                    lines.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("build", "serve"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--socket", type=Path)
    parser.add_argument("--models", type=lambda text: text.split(","))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.action == "build":
        build(options.directory, options.models, options.device)
    else:
        serve(options.directory, options.socket, options.device)


if __name__ == "__main__":
    main()
