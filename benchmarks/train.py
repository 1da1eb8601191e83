"""A whole training step on one GPU: HGRN2 and a Transformer of equal size, bare and through train.py, in the same run.

    python benchmarks/train.py [--rows 340M ...] [--only ours peer cli] [--profile]

AdamW (fused), bf16 autocast, random tokens. Ours is timed only after its compiled bf16 loss agrees with eager fp32's.
The peer is transformers' Llama with torch's SDPA (FlashAttention), compiled: as published (its own loss), and with our
loss. MFU counts 6 operations a parameter and token (looked-up embeddings left out), and for the Transformer its causal
attention, against the card's dense bf16 rate. Writes results/train.json beside this file.
"""

import argparse
import csv
import datetime
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from ops import commit_of, version_of  # benchmarks/ops.py

from hgrn2 import HGRN2Config
from hgrn2.loss import linear_cross_entropy
from tasks.lm.model import LanguageModel

OUT = Path(__file__).parent / "results"
VOCAB = 32_000
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, operations a second
# name: (width, depth, hidden width, rows, tokens a row)
ROWS = {
    "340M": (1024, 24, 2816, 16, 2048),
    "340M long": (1024, 24, 2816, 2, 16384),
    "1.3B": (2048, 24, 5632, 8, 2048),
}


def config(width: int, depth: int, hidden: int) -> HGRN2Config:
    return HGRN2Config(
        dim=width, depth=depth, expand_ratio=128, glu_width=hidden, glu_bias=False, bias=False, q_act="silu",
        v_act=None, norm="rmsnorm", mixer_norm="rmsnorm", final_norm="rmsnorm",
    )  # fmt: skip


def flags(width: int, depth: int, hidden: int, rows: int, tokens: int) -> list[str]:
    """The same model and batch as settings of train.py."""
    model = vars(config(width, depth, hidden))
    names = ("dim", "depth", "expand_ratio", "glu_width", "glu_bias", "bias", "norm", "mixer_norm", "final_norm")
    return [f"model.backbone.{name}={str(model[name]).lower()}" for name in names] + [
        f"model.vocab_size={VOCAB}", "model.tie_embeddings=false", f"data.batch_size={rows}",
        f"data.seq_len={tokens}",
    ]  # fmt: skip


# name: (width, depth, head dim, norm, positions, rows, data set)
LRA = {
    "ListOps": (64, 5, 4, "batchnorm", "sinusoid", 128, "random_data:ListOpsLengths"),
    "Text": (128, 4, 8, "layernorm", "null", 64, "random_data:TextLengths"),
}


def lra_through_train(name: str, steps: int = 400) -> dict:
    """Milliseconds a step of train.py on random sequences of the task's lengths, packed and padded."""
    width, depth, head, norm, positions, rows, data = LRA[name]
    found = {}
    for packed in ("true", "false"):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable, "train.py", "task=lra", f"run_root={folder}/runs", "logger=csv",
                f"data.dataset={data}", f"data.batch_size={rows}", f"data.packed={packed}", "data.num_workers=4",
                f"model.backbone.dim={width}", f"model.backbone.depth={depth}", f"model.backbone.expand_ratio={head}",
                f"model.backbone.glu_width={width}", f"model.backbone.norm={norm}",
                f"model.backbone.final_norm={norm}", f"model.positions={positions}",
                "trainer.precision=bf16-mixed", f"trainer.max_steps={steps}", "model.optim.warmup_steps=10",
                "trainer.log_every_n_steps=50", "trainer.limit_val_batches=0", "trainer.num_sanity_val_steps=0",
                "checkpoint.every_n_steps=0", "trainer.enable_checkpointing=false", "trainer.gradient_clip_val=0",
            ]  # fmt: skip
            environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            key = "packed" if packed == "true" else "padded"
            if done.returncode:
                found[key] = {"error": done.stdout[-1500:] + done.stderr[-1500:]}
                continue
            (path,) = Path(folder).glob("runs/lra/*/csv/metrics.csv")
            seen = [float(x["train/samples_per_s"]) for x in csv.DictReader(path.open()) if x["train/samples_per_s"]]
            found[key] = {"ms": rows / statistics.median(seen[2:]) * 1e3, "all ms": [rows / x * 1e3 for x in seen]}
    return found


class Bare:
    """A loop without a trainer: `loss(batch)`, backward, AdamW."""

    def __init__(self, model: torch.nn.Module, loss, rows: int, tokens: int):
        self.model, self.loss = model, loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator("cuda").manual_seed(1)
        shape = (4, rows, tokens + 1)
        self.batches = torch.randint(VOCAB, shape, device="cuda", generator=generator)
        self.steps = 0

    def step(self) -> None:
        batch = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self, count: int = 20) -> dict:
        """Tokens a second (median of the steps' times), peak memory, and what the first step took."""
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        self.step()
        torch.cuda.synchronize()
        first = time.perf_counter() - began
        for _ in range(4):
            self.step()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        for mark in marks:
            mark.record()
            self.step()
        torch.cuda.synchronize()
        ms = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
        tokens = self.batches[0, :, 1:].numel()
        return {
            "tokens/s": tokens / ms * 1e3,
            "ms": ms,
            "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
            "first step s": first,
        }


def our_loss(model: LanguageModel, batch: torch.Tensor) -> torch.Tensor:
    x, target = model.features(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
    return linear_cross_entropy(x, model.head.weight, target)[0] / len(target)


def ours(row: tuple, compiled: bool) -> Bare:
    width, depth, hidden, rows, tokens = row
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LanguageModel(config(width, depth, hidden), VOCAB, tie_embeddings=False)
    if compiled:
        model.backbone.compile_blocks()
    return Bare(model, our_loss, rows, tokens)


def gate(bare: Bare) -> dict:
    """The first loss, compiled and in bf16, against eager fp32; raises where they disagree."""
    batch = bare.batches[0, :2, :1025]
    with torch.no_grad():
        with torch.autocast("cuda", torch.bfloat16):
            fast = bare.loss(bare.model, batch).item()
        with torch.compiler.set_stance("force_eager"):
            true = bare.loss(bare.model, batch).item()
    if not abs(fast - true) < 2e-3 * true:
        raise SystemExit(f"the compiled bf16 loss is {fast}, eager fp32's {true}: nothing is timed")
    return {"bf16 compiled": fast, "fp32 eager": true}


def llama(row: tuple, our_head: bool) -> Bare:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, depth, hidden, rows, tokens = row
    settings = LlamaConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=depth, num_attention_heads=width // 128,
        num_key_value_heads=width // 128, vocab_size=VOCAB, max_position_embeddings=tokens, tie_word_embeddings=False,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(settings).float()
    if not our_head:
        model.compile()
        return Bare(model, lambda m, batch: m(input_ids=batch[:, :-1], labels=batch[:, :-1]).loss, rows, tokens)
    model.model.compile()

    def loss(m, batch):
        x = m.model(input_ids=batch[:, :-1]).last_hidden_state.flatten(0, 1)
        target = batch[:, 1:].flatten()
        return linear_cross_entropy(x, m.lm_head.weight, target)[0] / len(target)

    return Bare(model, loss, rows, tokens)


def random_corpus(folder: Path, files: int = 200, size: int = 60_000) -> Path:
    """Files of random bytes: gates stay as they start, as in the bare loops (trained ones take slower paths)."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(files):
        data = torch.randint(256, (size,), generator=generator, dtype=torch.uint8)
        (folder / f"{i}.py").write_bytes(bytes(data.tolist()))
    return folder


def through_train(row: tuple, steps: int = 100) -> dict:
    """train.py on random bytes: tokens a second as it logs them (median window), and the whole process's seconds."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = random_corpus(Path(folder) / "corpus")
        command = [
            sys.executable, "train.py", "task=lm", *flags(*row), f"run_root={folder}/runs", "logger=csv",
            f"data.path={corpus}", "trainer.gradient_clip_val=1.0",
            "trainer.precision=bf16-mixed", f"trainer.max_steps={steps}", "model.optim.warmup_steps=10",
            "trainer.log_every_n_steps=10", "trainer.limit_val_batches=0", "trainer.num_sanity_val_steps=0",
            "checkpoint.every_n_steps=0", "trainer.enable_checkpointing=false", "model.optim.lr=1e-4",
        ]  # fmt: skip
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"error": done.stdout[-1500:] + done.stderr[-1500:]}
        seconds = time.perf_counter() - began
        (path,) = Path(folder).glob("runs/lm/*/csv/metrics.csv")
        rates = [float(x["train/tokens_per_s"]) for x in csv.DictReader(path.open()) if x["train/tokens_per_s"]]
    return {"tokens/s": statistics.median(rates[2:]), "all": rates, "whole process s": seconds}


def mfu(name: str, rate: float, row: tuple, attention: bool) -> float | None:
    """Share of the card's dense bf16 rate: 6 operations a parameter and token, and 6 T D a layer for causal scores."""
    width, depth, hidden, _, tokens = row
    parameters = depth * (4 * width**2 + 3 * width * hidden) + VOCAB * width
    work = 6 * parameters + (6 * depth * width * tokens if attention else 0)
    peak = next((rate for card, rate in PEAK.items() if card in name), math.nan)
    return rate * work / peak


def profile(bare: Bare, top: int = 45) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            bare.step()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda x: -x.self_device_time_total)[:top]
    return "\n".join(f"{x.self_device_time_total / 3e3:9.3f} ms {x.count / 3:7.1f}x {x.key[:150]}" for x in rows)


def free(*objects) -> None:
    del objects
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["340M"], choices=[*ROWS, *LRA])
    parser.add_argument("--only", nargs="+", default=["ours", "eager", "peer", "cli"])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT / "train.json")
    args = parser.parse_args()
    card = torch.cuda.get_device_name()
    results = {
        "about": {
            "device": card,
            "versions": {name: version_of(name) for name in ("torch", "triton", "lightning", "transformers")},
            "commit": commit_of(),
            "command": " ".join(["python", "benchmarks/train.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        },
        "rows": {},
    }
    for name in args.rows:
        found = results["rows"].setdefault(name, {})
        if name in LRA:
            found["train.py"] = lra_through_train(name)
            sys.stdout.write(f"{name} train.py: {found['train.py']}\n")
            continue
        row = ROWS[name]
        jobs = {
            "ours, compiled": ("ours", lambda row=row: ours(row, True)),
            "ours, eager": ("eager", lambda row=row: ours(row, False)),
            "Llama, compiled": ("peer", lambda row=row: llama(row, False)),
            "Llama, compiled, our loss": ("peer", lambda row=row: llama(row, True)),
        }
        for label, (group, make) in jobs.items():
            if group not in args.only:
                continue
            bare = make()
            if group == "ours":
                found["gate"] = gate(bare)
            found[label] = bare.measure()
            found[label]["MFU"] = mfu(card, found[label]["tokens/s"], row, group == "peer")
            sys.stdout.write(f"{name} {label}: {found[label]}\n")
            if args.profile and group == "ours":
                sys.stdout.write(profile(bare) + "\n")
            bare = None
            free()
        if "cli" in args.only:
            found["ours, train.py"] = through_train(row)
            sys.stdout.write(f"{name} train.py: {found['ours, train.py']}\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
