"""Draft with a small model, verify with the large one: fewer passes of the large one, and exactly its own text."""

from specedge import Engine, SamplingParams, SpeculativeEngine
from specedge.cli import DEMO

PROMPTS = ["def fibonacci(n):", "    def __repr__(self):\n", "try:\n    import json\nexcept"]


def main() -> None:
    with Engine.from_pretrained(DEMO / "target") as target, SpeculativeEngine(target, DEMO / "draft") as both:
        print(f"{'temperature':>11} {'tokens':>7} {'rounds':>7} {'tokens per round':>17} {'accepted':>9} {'drafted':>8}")
        for temperature in (0.0, 0.8):
            params = SamplingParams(temperature=temperature, max_tokens=60, seed=7)
            for done, alone in zip(both.generate(PROMPTS, params), target.generate(PROMPTS, params), strict=True):
                s, n = done.speculation, len(done.token_ids)
                print(f"{temperature:>11} {n:>7} {s.rounds:>7} {s.tokens_per_round(n):>17.2f} {s.accepted:>9} {s.drafted:>8}")
                assert done.token_ids == alone.token_ids
        print("every text is the one that the target writes alone")


if __name__ == "__main__":
    main()
