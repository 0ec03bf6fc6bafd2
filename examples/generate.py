"""Complete several prompts, batched into the same forward passes."""

from specedge import Engine, SamplingParams
from specedge.cli import DEMO

PROMPTS = ["def fibonacci(n):", "import os\n\n\nclass Reader:\n", "for name in sorted("]


def main() -> None:
    with Engine.from_pretrained(DEMO / "target", progress=True) as engine:  # a directory in Hugging Face format, or a hub id
        for prompt, done in zip(PROMPTS, engine.generate(PROMPTS, SamplingParams(max_tokens=40)), strict=True):
            print(f"--- {done.prompt_tokens} tokens of prompt, {len(done.token_ids)} more, ended by {done.finish_reason}")
            print(prompt + done.text)


if __name__ == "__main__":
    main()
