"""Train the shipped pair: a byte-level BPE, a small Llama target and a smaller draft, on Python's own library.

    python tools/train_demo.py --work build/demo --out specedge/demo

The corpus is the standard library of the running interpreter, its tests included (PSF licence); data tables and
generated code are left out, and one file in 32 is held back for evaluation. Stages run in order, each is skipped when its result
exists in --work; texts resume after the last file, target and draft from their last checkpoint:

    tokenizer -> tokens -> target (cross entropy) -> texts (that the target writes) -> draft (distilled on them) -> export

The draft learns what it will be asked: continuations of the corpus that the target sampled, greedy ones among them. With each token of a text are
kept the target's TOP likeliest ids and their log probabilities, so a text can be read again without the target. The loss is the KL divergence at
temperature 1 from these alone: a draft calibrated for lower temperatures is flatter, and agrees with the target less often even there. Its
embeddings begin as the main directions of the target's.

It knows nothing of the engine: the models here are plain torch with Hugging Face names, so exporting is writing the state dict.
`tools/evaluate_demo.py` writes the card.
"""

import argparse
import hashlib
import json
import math
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

END = "<|endoftext|>"
VOCAB = 4096
CONTEXT = 1024  # trained length of the last steps; earlier ones run at 256 and 512, where attention is cheaper
TARGET = {"hidden_size": 384, "intermediate_size": 864, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
DRAFT = {"hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
TOP = 32  # of the target's likeliest ids are kept with each token; 0.92 of the probability
TEMPERATURES = (0.0, 0.7, 0.85, 1.0)  # of the texts that the draft learns from, row by row


# ----------------------------------------------------------------------------------------------------------------------
# corpus


def library_files() -> list[Path]:
    """Source files of the standard library worth reading: no tables, no generated code, nothing installed by pip."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = re.compile(r"site-packages|/encodings/|/pydoc_data/|lib2to3/tests/data|/test/encoded_modules/|/turtledemo/|_sysconfigdata")
    kept = []
    for path in sorted(root.rglob("*.py")):
        if skip.search(str(path)) or not 200 <= path.stat().st_size <= 600_000:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if re.search(r"(?i)auto-?generated|generated (by|from|automatically)|do not edit", text[:1500]):
            continue
        digits = len(re.findall(r"[0-9]|\\x..|\\u....", text)) / len(text)
        ascii_share = sum(c < "\x7f" for c in text) / len(text)
        if digits > 0.2 or ascii_share < 0.98:  # data tables
            continue
        kept.append(path)
    return kept


def held_back(path: Path) -> bool:
    """One file in 32, chosen by name so that the split survives a change of the file list."""
    return hashlib.sha256(path.name.encode()).digest()[0] < 8


def train_tokenizer(files: list[Path], out: Path) -> None:
    """Byte-level BPE of VOCAB entries; id 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=True
    )
    tokenizer.train_from_iterator((p.read_text(encoding="utf-8") for p in files), trainer)
    tokenizer.save(str(out))


def encode(tokenizer: Tokenizer, files: list[Path], seed: int) -> np.ndarray:
    """All files as one uint16 stream, shuffled, each behind END."""
    order = np.random.default_rng(seed).permutation(len(files))
    texts = [files[i].read_text(encoding="utf-8") for i in order]
    stream = [np.array([0, *e.ids], dtype=np.uint16) for e in tokenizer.encode_batch(texts)]
    return np.concatenate(stream)


# ----------------------------------------------------------------------------------------------------------------------
# model: Hugging Face names, so that the state dict is the checkpoint


class Attention(nn.Module):
    def __init__(self, c: dict[str, int]) -> None:
        super().__init__()
        h, d, hq, hkv = c["hidden_size"], c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
        self.head_dim = d
        self.q_proj = nn.Linear(h, hq * d, bias=False)
        self.k_proj = nn.Linear(h, hkv * d, bias=False)
        self.v_proj = nn.Linear(h, hkv * d, bias=False)
        self.o_proj = nn.Linear(hq * d, h, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Tensor | None, at: int) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, self.head_dim).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if past is not None:
            past[0, :, :, at : at + t], past[1, :, :, at : at + t] = k, v
        if at:  # one token: the query heads that share K/V stand as rows of one head, which spares copies of the K/V
            shared = q.reshape(b, k.shape[1], -1, self.head_dim)
            o = F.scaled_dot_product_attention(shared, past[0, :, :, : at + 1], past[1, :, :, : at + 1]).reshape(b, -1, 1, self.head_dim)
        else:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(o.transpose(1, 2).reshape(b, t, -1))


class Mlp(nn.Module):
    def __init__(self, c: dict[str, int]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: dict[str, int]) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c["hidden_size"], eps=1e-5)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"], eps=1e-5)
        self.mlp = Mlp(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Tensor | None, at: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, past, at)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Llama with tied embeddings. `tokens [B, T]` -> logits `[B, T, V]`."""

    def __init__(self, c: dict[str, int]) -> None:
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(VOCAB, c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.RMSNorm(c["hidden_size"], eps=1e-5)
        angle = torch.outer(torch.arange(CONTEXT), 10000.0 ** (-torch.arange(0, c["head_dim"], 2) / c["head_dim"]))
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angle.sin().repeat(1, 2), persistent=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        for layer in self.layers:  # residual branches start small
            for p in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c["num_hidden_layers"]))

    def forward(self, tokens: Tensor, past: Tensor | None = None, at: int = 0) -> Tensor:
        """`past [layers, 2, B, Hkv, T', D]`: K/V of tokens 0 .. at-1, to which that of `tokens` is added."""
        t = tokens.shape[1]
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, self.cos[at : at + t], self.sin[at : at + t], None if past is None else past[i], at)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


# ----------------------------------------------------------------------------------------------------------------------
# texts that the target writes


@dataclass(frozen=True, slots=True)
class Texts:
    """Rows of equal length, `tokens [B, T + 1]`, and what the target thinks of each next token: `ids`, `logp [B, T, TOP]`, likeliest first."""

    tokens: np.ndarray
    ids: np.ndarray
    logp: np.ndarray


def shape_of(index: int) -> tuple[int, int, int]:
    """Rows, length of the prompts and of the rows of texts number `index`: most are short, as attention is dear; one in 16 is all corpus."""
    rng = np.random.default_rng((8, index))
    if index % 16 == 15:
        return 64, CONTEXT - 1, CONTEXT - 1
    return (128, int(rng.integers(96, 256)), 511) if index % 8 == 3 else (256, int(rng.integers(48, 128)), 255)


@torch.no_grad()
def write(target: Decoder, stream: np.ndarray, index: int) -> Texts:
    """Texts number `index`, a pure function of it: windows of the corpus, continued by `target` at TEMPERATURES."""
    rows, prompt, length = shape_of(index)
    c, device = target.config, target.cos.device
    at = np.random.default_rng((7, index)).integers(0, len(stream) - prompt - 1, rows)
    dice = torch.Generator().manual_seed(index)
    tokens = torch.zeros(rows, length + 1, dtype=torch.long, device=device)
    tokens[:, :prompt] = to_device(target, np.stack([stream[i : i + prompt] for i in at]))
    temperature = torch.tensor(TEMPERATURES, device=device).repeat(rows // len(TEMPERATURES))[:, None]
    past = torch.zeros(c["num_hidden_layers"], 2, rows, c["num_key_value_heads"], length, c["head_dim"], dtype=torch.bfloat16, device=device)
    ids = torch.zeros(rows, length, TOP, dtype=torch.long, device=device)
    logp = torch.zeros(rows, length, TOP, dtype=torch.half, device=device)
    for begin, end in [(0, prompt), *((p, p + 1) for p in range(prompt, length))]:
        last = torch.empty(rows, VOCAB, device=device)
        for r in range(0, rows, 8 if end == prompt else rows):  # keeps the logits of prompts in cache
            some = slice(r, r + 8 if end == prompt else rows)
            thought = target(tokens[some, begin:end], past[:, :, some], begin).float().log_softmax(-1)
            best = thought.topk(TOP, -1)
            ids[some, begin:end], logp[some, begin:end], last[some] = best.indices, best.values, thought[:, -1]
        reach = (last / temperature.clamp(min=1e-3)).softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(reach, torch.rand(rows, 1, generator=dice).to(device) * reach[:, -1:]).clamp(max=VOCAB - 1)
        tokens[:, end : end + 1] = torch.where(temperature == 0, ids[:, end - 1, :1], drawn)
    return Texts(tokens.cpu().numpy().astype(np.uint16), ids.cpu().numpy().astype(np.uint16), logp.cpu().numpy())


def texts_of(target: Decoder, stream: np.ndarray, args: argparse.Namespace) -> list[Texts]:
    """The first --texts of them, one file each in --work/texts; what is missing is written."""
    (args.work / "texts").mkdir(exist_ok=True)
    found = []
    for index in tqdm(range(args.texts), desc="texts"):
        file = args.work / "texts" / f"{index:04}.npz"
        if not file.exists():
            unfinished = file.with_suffix(".part")
            with unfinished.open("wb") as f:
                np.savez(f, **asdict(write(target, stream, index)))
            unfinished.replace(file)
        with np.load(file) as content:
            found.append(Texts(**content))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# training


def target_losses(model: Decoder, stream: np.ndarray, args: argparse.Namespace, step: int) -> Iterator[Tensor]:
    """Cross entropy of the corpus in one step, part by part; a pure function of the step so that a resumed run sees the same data."""
    length = 256 if step < 0.55 * args.target_steps else 512 if step < 0.88 * args.target_steps else CONTEXT
    at = np.random.default_rng((args.seed, step)).integers(0, len(stream) - length - 1, args.tokens // length)
    block = to_device(model, np.stack([stream[i : i + length + 1] for i in at]))
    for part in block.split(max(1, 2048 // length)):  # keeps the logits in cache
        with torch.autocast(model.cos.device.type, torch.bfloat16):
            logits = model(part[:, :-1])
        yield F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten()) * len(part) / len(block)


def draft_losses(model: Decoder, texts: "list[Texts]", args: argparse.Namespace, step: int) -> Iterator[Tensor]:
    """KL divergence from the target over some rows of one of `texts`; in parts, and a pure function of the step, too."""
    rng = np.random.default_rng((args.seed, step))
    sizes = np.array([t.ids.shape[0] * t.ids.shape[1] for t in texts])
    text = texts[rng.choice(len(texts), p=sizes / sizes.sum())]
    length = text.ids.shape[1]
    rows = rng.choice(len(text.ids), args.draft_tokens // length, replace=False)
    for part in np.split(rows, range(max(1, 2048 // length), len(rows), max(1, 2048 // length))):
        tokens, ids = to_device(model, text.tokens[part, :-1]), to_device(model, text.ids[part])
        wanted = to_device(model, text.logp[part]).float().log_softmax(-1)
        yield divergence(model, tokens, ids, wanted) * len(part) / len(rows)


@torch.compile(dynamic=False)  # one and a half times as fast: so large are the logits of a small model
def divergence(model: Decoder, tokens: Tensor, ids: Tensor, wanted: Tensor) -> Tensor:
    """Mean KL divergence. `tokens [B, T]`; `ids`, `wanted [B, T, TOP]`: the target's likeliest and their log probabilities."""
    with torch.autocast(model.cos.device.type, torch.bfloat16):
        logits = model(tokens)
    logits = logits.float()
    got = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
    return (wanted.exp() * (wanted - got)).sum(-1).mean()


def to_device(model: Decoder, x: np.ndarray) -> Tensor:
    """Ids as int64, anything else as it is."""
    return torch.from_numpy(x.astype(np.int64) if x.dtype == np.uint16 else x).to(model.cos.device)


def optimizers(model: Decoder, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (it needs about half the tokens of AdamW at this size), AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1.5 * lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(name: str, model: Decoder, losses: Callable[[int], Iterator[Tensor]], args: argparse.Namespace, steps: int, lr: float) -> None:
    """Train `model` in place on the `losses` of each step, which are parts of a sum. Resumes from --work/NAME.pt."""
    device = model.cos.device
    state_file = args.work / f"{name}.pt"
    groups = optimizers(model, lr)
    start = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for o, s in zip(groups, state["optimizers"], strict=True):
            o.load_state_dict(s)
        start = state["step"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10.0)
    saved = time.monotonic()
    for step in bar:
        scale = min(1.0, (step + 1) / 60) * min(1.0, (steps - step) / (0.6 * steps))  # warm up, hold, decay to zero
        for o, rate in zip(groups, (lr, 1.5 * lr), strict=True):
            for g in o.param_groups:
                g["lr"] = rate * scale
        total = 0.0
        for loss in losses(step):
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in groups:
            o.step()
            o.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{total:.3f}")
        if step % 20 == 0:
            print(json.dumps({"model": name, "step": step, "loss": round(total, 4)}), file=args.log, flush=True)
        if step + 1 == steps or time.monotonic() - saved > 120:
            unfinished = state_file.with_suffix(".part")
            torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in groups], "step": step + 1}, unfinished)
            unfinished.replace(state_file)
            saved = time.monotonic()


@torch.no_grad()
def held_back_loss(model: Decoder, stream: np.ndarray) -> float:
    """Mean cross entropy in nats over the held-back stream, in windows of 512 tokens."""
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for at in range(0, len(stream) - 513, 512 * 8):
        rows = [stream[i : i + 513] for i in range(at, min(at + 512 * 8, len(stream) - 513), 512)]
        block = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
        logits = model(block[:, :-1]).float()
        total += F.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten(), reduction="sum").item()
        count += block[:, 1:].numel()
    return total / count


# ----------------------------------------------------------------------------------------------------------------------
# export


def export(model: Decoder, tokenizer: Path, out: Path) -> None:
    """A Hugging Face directory: config.json, generation_config.json, tokenizer.json, tokenizer_config.json, bf16 safetensors."""
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, **model.config,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16",
    }  # fmt: skip
    for file, content in {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0},
        "tokenizer_config.json": {"bos_token": END, "eos_token": END, "model_max_length": CONTEXT, "tokenizer_class": "PreTrainedTokenizerFast"},
    }.items():
        (out / file).write_text(json.dumps(content, indent=2) + "\n")
    (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    weights = {f"model.{n}": p.detach().to(torch.bfloat16).cpu().contiguous() for n, p in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def stages(args: argparse.Namespace) -> Iterator[str]:
    """Run what is missing; yields a line after each stage."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = library_files()
    learn, held = [f for f in files if not held_back(f)], [f for f in files if held_back(f)]
    size = sum(f.stat().st_size for f in learn)
    yield f"corpus: {len(learn)} files, {size / 1e6:.1f} MB; held back: {len(held)} files, {sum(f.stat().st_size for f in held) / 1e6:.1f} MB"

    vocabulary = args.work / "tokenizer.json"
    if not vocabulary.exists():
        train_tokenizer(learn, vocabulary)
    tokenizer = Tokenizer.from_file(str(vocabulary))
    if not (args.work / "held.npy").exists():
        np.save(args.work / "learn.npy", encode(tokenizer, learn, args.seed))
        np.save(args.work / "held.npy", encode(tokenizer, held, args.seed))
    stream, test = np.load(args.work / "learn.npy"), np.load(args.work / "held.npy")
    held_bytes = sum(f.stat().st_size for f in held)
    yield f"tokens: {len(stream) / 1e6:.2f} M to learn ({size / len(stream):.2f} bytes per token), {len(test) / 1e6:.2f} M held back"

    def finish(name: str, model: Decoder, seen: int, **more: str) -> str:
        """Export a trained model; returns what is known of it."""
        model.eval().requires_grad_(False)
        loss = held_back_loss(model, test)
        bits = loss / math.log(2) * len(test) / held_bytes
        parameters = sum(p.numel() for p in model.parameters())
        facts = {"parameters": parameters, "tokens_seen": seen, "held_back_loss": round(loss, 4), "bits_per_byte": round(bits, 4), **more}
        (args.work / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
        export(model, vocabulary, args.out / name)
        return f"{name}: {json.dumps(facts)} -> {args.out / name}"

    torch.manual_seed(args.seed)
    target = Decoder(TARGET).to(device)
    train("target", target, partial(target_losses, target, stream, args), args, args.target_steps, args.lr)
    yield finish("target", target, args.target_steps * args.tokens)

    texts = texts_of(target.to(torch.bfloat16), stream, args)
    written = f"{sum(t.ids.shape[0] * t.ids.shape[1] for t in texts) / 1e6:.1f} M tokens of texts that the target wrote"
    yield f"texts: {written}"
    torch.manual_seed(args.seed)
    draft = Decoder(DRAFT).to(device)
    with torch.no_grad():  # half as long as they are: a tied model begins by repeating what it reads
        u, s, _ = torch.linalg.svd(target.embed_tokens.weight.float(), full_matrices=False)
        draft.embed_tokens.weight.copy_(0.5 * (u * s)[:, : DRAFT["hidden_size"]])
    train("draft", draft, partial(draft_losses, draft, texts, args), args, args.draft_steps, 1.5 * args.lr)
    taught = f"{written}, in {args.draft_steps:,} steps of {args.draft_tokens:,} tokens"
    yield finish("draft", draft, args.draft_steps * args.draft_tokens, taught=taught)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--work", type=Path, default=Path("build/demo"), help="checkpoints and token streams; a second run resumes here")
    p.add_argument("--out", type=Path, default=Path("specedge/demo"), help="where target/ and draft/ are written")
    p.add_argument("--target-steps", type=int, default=1300, help="steps of --tokens tokens")
    p.add_argument("--tokens", type=int, default=8192, help="tokens in a step of the target")
    p.add_argument("--texts", type=int, default=31, help="files of about 65,000 tokens that the target writes for the draft")
    p.add_argument("--draft-steps", type=int, default=1800)
    p.add_argument("--draft-tokens", type=int, default=4096, help="tokens in a step of the draft")
    p.add_argument("--lr", type=float, default=2e-3, help="Muon's rate for the target")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    with (args.work / "log.jsonl").open("a") as args.log:
        for line in stages(args):
            print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
