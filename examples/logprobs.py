"""How sure the model was of every token, and what it would have liked as well."""

import math

from specedge import Engine, SamplingParams
from specedge.cli import DEMO


def main() -> None:
    with Engine.from_pretrained(DEMO / "target") as engine:
        tokenizer = engine.tokenizer
        assert tokenizer is not None
        done = engine.generate("def fibonacci(n):", SamplingParams(temperature=0.8, max_tokens=16, seed=4, logprobs=3))[0]
        assert done.logprobs is not None
        print(f"{'token':<12} {'probability':>11}   likeliest")
        for chosen in done.logprobs:
            likeliest = ", ".join(f"{tokenizer.decode([i])!r} {math.exp(p):.2f}" for i, p in chosen.top)
            print(f"{tokenizer.decode([chosen.token_id])!r:<12} {math.exp(chosen.logprob):>11.3f}   {likeliest}")
        mean = sum(p.logprob for p in done.logprobs) / len(done.logprobs)
        print(f"perplexity {math.exp(-mean):.2f}")


if __name__ == "__main__":
    main()
