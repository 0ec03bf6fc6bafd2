"""Measure the shipped pair on held-back files and write its card, specedge/demo/README.md.

    python tools/evaluate_demo.py --work build/demo

Losses come from the training run in --work; tokens per round and repetition are measured here with the engine itself, on prefixes of files
that training never saw. Knows nothing of how the models were trained.
"""

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm
from train_demo import held_back, library_files

from specedge import DraftConfig, EngineConfig, SamplingParams, SpeculativeEngine
from specedge.engine.drafter import Drafter
from specedge.engine.engine import Engine

DEMO = Path(__file__).parents[1] / "specedge" / "demo"
PREFIX, TOKENS, NODES = 96, 128, 31
FORWARDS = 7  # that grow a tree: left to itself a drafter grows what pays on this machine, where the two models share their cores


def prefixes(engine: Engine, count: int) -> Iterator[list[int]]:
    """PREFIX tokens from the middle of held-back files that are long enough."""
    files = [f for f in library_files() if held_back(f)]
    for file in files[:: max(1, len(files) // count)][:count]:
        ids = engine.encode(file.read_text(encoding="utf-8"))
        if len(ids) > 2 * PREFIX:
            yield ids[len(ids) // 2 - PREFIX : len(ids) // 2]


def repeated(ids: list[int], n: int = 8) -> float:
    """Share of n-grams that occurred before in the same text."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--work", type=Path, default=Path("build/demo"))
    p.add_argument("--demo", type=Path, default=DEMO, help="folder of target/ and draft/")
    p.add_argument("--prefixes", type=int, default=40)
    p.add_argument("--no-card", action="store_true", help="print only")
    args = p.parse_args()
    engine = Engine.from_pretrained(args.demo / "target", device="cpu", sizes=EngineConfig(admission=False))  # whole trees
    config = DraftConfig(tree_size=NODES, depth=FORWARDS, autopilot=False, max_sessions=4, engine=EngineConfig(kv_tokens=4096, max_rows=256))
    both = SpeculativeEngine(engine, Drafter.from_pretrained(args.demo / "draft", config, device="cpu"))
    prompts = list(prefixes(engine, args.prefixes))
    rates, repetition = {}, 0.0
    for temperature in (0.0, 0.7, 0.8, 1.0):
        tokens = rounds = hits = 0
        texts: list[list[int]] = []
        for at in tqdm(range(0, len(prompts), 4), desc=f"T = {temperature}"):
            for done in both.generate(prompts[at : at + 4], SamplingParams(temperature=temperature, max_tokens=TOKENS, seed=at)):
                tokens, rounds, hits = tokens + len(done.token_ids), rounds + done.speculation.rounds, hits + done.speculation.hits
                texts.append(done.token_ids)
        rates[temperature] = tokens / rounds
        if temperature == 0:
            repetition = sum(map(repeated, texts)) / len(texts)
        print(f"T = {temperature}: {tokens / rounds:.2f} tokens per round over {tokens} tokens; {hits / rounds:.2f} of the new roots were drafted")
    print(f"repeated 8-grams in greedy text: {repetition:.1%}")
    if not args.no_card:
        (args.demo / "README.md").write_text(card(args.work, rates, repetition, len(prompts)))


def card(work: Path, rates: dict[float, float], repetition: float, count: int) -> str:
    """The model card."""
    facts = {name: json.loads((work / f"{name}.json").read_text()) for name in ("target", "draft")}
    rows = "\n".join(
        f"| {name} | {f['parameters'] / 1e6:.2f} M | {f['parameters'] * 2 / 1e6:.1f} MB | {f['tokens_seen'] / 1e6:.1f} M | "
        f"{f['held_back_loss']:.3f} nats per token | {f['bits_per_byte']:.3f} |"
        for name, f in facts.items()
    )
    brought = ", ".join(f"**{rate:.2f}** at T = {temperature:g}" for temperature, rate in rates.items())
    return f"""# The shipped pair

Two Llama-shaped models and their tokenizer, made by `tools/train_demo.py`, so that specedge runs and is tested without a download. They complete
Python source of the kind that is in Python's own library; they know nothing else, and their programs are rarely right.

| model | parameters | bf16 | tokens seen | loss on held-back files | bits per byte |
|---|---|---|---|---|---|
{rows}

- **Data**: the source files of the standard library of CPython {platform.python_version()}, its tests included; data tables and generated code are
  left out, and so is one file in 32, chosen by the hash of its name, for evaluation. Licence of the data: PSF License Agreement.
- **Tokenizer**: byte-level BPE of 4,096 tokens, trained on the same files; id 0 ends a text.
- **Training**: the target by cross entropy, Muon and AdamW, bfloat16 autocast on CPU cores; the draft by KL divergence to the target, on
  {facts["draft"]["taught"]}.
- **Tokens per round** with {NODES} nodes of {FORWARDS} forwards on {count} held-back prefixes of {PREFIX} tokens, {TOKENS} new
  ones each: {brought}.
- **Repetition**: {repetition:.1%} of the 8-grams in greedy text occurred before in the same text.
- Numbers: `python tools/evaluate_demo.py --no-card`, float32 on a CPU.
"""


if __name__ == "__main__":
    main()
