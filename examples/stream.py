"""Print a text while it comes, and stop it in the middle."""

from specedge import Engine, SamplingParams
from specedge.cli import DEMO

PROMPT = "def fibonacci(n):"


def main() -> None:
    with Engine.from_pretrained(DEMO / "target") as engine:
        print(PROMPT, end="")
        for chunk in engine.stream(PROMPT, SamplingParams(max_tokens=60)):
            print(chunk.text, end="", flush=True)
            if chunk.completion:  # the last one carries the whole
                print(f"\n--- ended by {chunk.completion.finish_reason} after {len(chunk.completion.token_ids)} tokens")

        stream, text = engine.stream(PROMPT, SamplingParams(max_tokens=1000)), PROMPT
        for chunk in stream:
            text += chunk.text
            if text.count("\n") == 3:
                stream.close()  # ends the text and frees what it held; so does letting go of the iterator
        print(f"--- the first lines alone:\n{text}")


if __name__ == "__main__":
    main()
