"""GRPO on a language model, with PyTorch and transformers: policy, reward and reference take turns on one GPU.

    python grpo.py [--steps 40] [--hidden 64 --layers 2 --lr 0.003] [--model NAME]

The reward model likes the letter e. Weights are random unless `--model` names a pretrained policy. In float32 each
parameter of the policy takes 16 bytes (weight, gradient, AdamW), of the others 4 once they are made: with `--hidden
4096 --layers 18 --lr 5e-5` each role fits an H100 of 80 GB, all three do not. Needs a daemon, ray, and RAM for all.
"""

import argparse
import math
from typing import Any

import ray

from ray_integration import Phases, freezable

PROMPTS = ("the weather is", "once upon a time", "two of us went", "nobody has seen")
GROUP, LENGTH, EPOCHS, CLIP, KL_WEIGHT = 16, 24, 2, 0.2, 0.01
OPTIONS = {"steps": 40, "hidden": 64, "layers": 2, "lr": 0.003, "model": ""}


def advantages(scores: Any) -> Any:
    """How much better each sample is than its group: scores[prompt, sample], NumPy's or tensors, in deviations."""
    over = scores - scores.mean(-1, keepdims=True)
    return over / ((over**2).mean(-1, keepdims=True) ** 0.5 + 1e-6)


def loss(new: Any, old: Any, reference: Any, gains: Any) -> Any:
    """Of log probabilities [sample, token] and advantages [sample, 1]: clipped, and with an estimate of the KL."""
    ratio = math.e ** (new - old)
    gain = (ratio * gains).clip(None, ratio.clip(1 - CLIP, 1 + CLIP) * gains)
    return (KL_WEIGHT * (math.e ** (reference - new) - (reference - new) - 1) - gain).mean()


class Model:
    """Policy, reward or reference. Without a pretrained one's name: of bytes, random, taught to expect ``liked``."""

    def __init__(self, options: argparse.Namespace, name: str, liked: str = "") -> None:
        import torch
        import transformers as t

        torch.manual_seed(1)  # the reference is what the policy was
        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        self.tokens = t.AutoTokenizer.from_pretrained(name) if name else None
        c = t.GPT2Config(vocab_size=256, n_embd=options.hidden, n_layer=options.layers, n_head=4)
        with torch.device(self.device):
            model = t.AutoModelForCausalLM.from_pretrained(name) if name else t.GPT2LMHeadModel(c)
        self.model = model.to(self.device, torch.float32).eval()  # no dropout
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, foreach=False)
        for byte in liked.encode() * 30:
            text = torch.randint(256, (GROUP, LENGTH), device=self.device)
            self.step(-self.model(text).logits.log_softmax(-1)[..., byte].mean())
        self.optimizer.state.clear()
        torch.cuda.empty_cache()  # what the lessons took is others'

    def step(self, value: Any) -> None:
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def log_probs(self, tokens: Any) -> Any:
        """Of the last tokens, those of the answers: [sample, token]."""
        tokens = self.torch.as_tensor(tokens, device=self.device)
        shares = self.model(tokens).logits[:, -LENGTH - 1 : -1].log_softmax(-1)
        return shares.gather(-1, tokens[:, -LENGTH:, None])[..., 0]

    def judge(self, tokens: Any) -> Any:
        return self.torch.no_grad()(self.log_probs)(tokens).cpu().numpy()

    def score(self, texts: list[list[int]]) -> Any:
        """How likely each byte is to this model, on average: scores[prompt, sample], between 0 and 1."""
        return (math.e ** self.judge(texts)).mean(-1).reshape(len(PROMPTS), GROUP)

    def write(self) -> tuple[Any, list[list[int]]]:
        """A group for each prompt: tokens[sample, place] with the prompt's, and the answers' bytes after a zero."""
        begun = [self.tokens.encode(each) if self.tokens else [*each.encode()] for each in PROMPTS]
        start = min(map(len, begun))  # one length, so that nothing is padded
        prompts = self.torch.tensor([b[-start:] for b in begun for _ in range(GROUP)])
        how = {"max_new_tokens": LENGTH, "eos_token_id": None, "pad_token_id": 0, "top_k": 0}
        tokens = self.model.generate(prompts.to(self.device), do_sample=True, **how).cpu().numpy()
        texts = [self.tokens.decode(t).encode() if self.tokens else t for t in tokens[:, start:]]
        return tokens, [[0, *bytes([*text][:LENGTH]).ljust(LENGTH)] for text in texts]

    def learn(self, tokens: Any, scores: Any, reference: Any) -> float:
        """Some steps up the gradient; the mean score that they were made from."""
        known = self.judge(tokens), reference, advantages(scores).reshape(-1, 1)
        known = tuple(self.torch.tensor(each, device=self.device) for each in known)
        for _ in range(EPOCHS):
            self.step(loss(self.log_probs(tokens), *known))
        return float(scores.mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args()
    ray.init(log_to_driver=False, include_dashboard=False)
    roles: list[Any] = []
    for role in ((options.model, ""), ("", "e"), (options.model, "")):
        roles.append(freezable(start_frozen=True)(Model).remote(options, *role))
        ray.get(roles[-1].__ray_ready__.remote())  # one after the other: they need not fit
    policy, reward, reference = roles
    phases = Phases({"rollout": policy, "score": [reward, reference], "train": policy})
    for step in range(1, options.steps + 1):
        phases.phase("rollout")
        tokens, texts = policy.write.options(num_returns=2).remote()
        ray.wait([tokens])  # a phase waits only for calls that have reached their model
        off = phases.phase("score")
        judged = [reward.score.remote(texts), reference.judge.remote(tokens)]
        ray.wait(judged, num_returns=2)
        on = phases.phase("train")
        mean = ray.get(policy.learn.remote(tokens, *judged))
        print(f"step {step}: mean reward {mean:.3f}, swaps {off.duration_s + on.duration_s:.2f} s")


if __name__ == "__main__":
    main()
