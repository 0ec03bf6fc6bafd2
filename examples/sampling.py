"""Sampling: several completions of one prompt, each of which its seed brings back, and the parameters that shape them."""

from specedge import Engine, SamplingParams
from specedge.cli import DEMO

PROMPT = "class Stack:\n    def push(self"
SHAPES = {
    "the likeliest": SamplingParams(max_tokens=24),
    "wild": SamplingParams(temperature=1.5, max_tokens=24, seed=1),
    "wild, of the 5 likeliest": SamplingParams(temperature=1.5, top_k=5, max_tokens=24, seed=1),
    "no word twice, if it can": SamplingParams(temperature=0.7, repetition_penalty=1.5, frequency_penalty=0.5, max_tokens=24, seed=1),
    "up to a string": SamplingParams(temperature=0.7, stop=("return", "def"), max_tokens=100, seed=1),
}


def main() -> None:
    with Engine.from_pretrained(DEMO / "target") as engine:
        for name, params in SHAPES.items():
            print(f"{name:<26} {engine.generate(PROMPT, params)[0].text!r}")
        three = engine.generate(PROMPT, SamplingParams(temperature=0.9, max_tokens=24, n=3))  # no seed: one is drawn, and reported
        again = engine.generate(PROMPT, SamplingParams(temperature=0.9, max_tokens=24, seed=three[2].seed))[0]
        for done in three:
            print(f"seed {done.seed:<21} {done.text!r}")
        print("the third again:", again.text == three[2].text)


if __name__ == "__main__":
    main()
