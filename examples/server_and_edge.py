"""A server and an edge, here in one process: the edge drafts, the server verifies, and only token ids pass between them.

On two machines these are `specedge-server serve MODEL` and `specedge-edge generate --server specedge://HOST:PORT --draft MODEL`.
"""

from specedge import Edge, Engine, SamplingParams, Server
from specedge.cli import DEMO

PROMPT = "def fibonacci(n):"


def main() -> None:
    params = SamplingParams(temperature=0.7, max_tokens=60, seed=7)
    with Engine.from_pretrained(DEMO / "target") as engine:
        with Server(engine) as server, Edge(server.address, DEMO / "draft") as edge:
            print(PROMPT, end="")
            for chunk in edge.stream(PROMPT, params):
                print(chunk.text, end="", flush=True)
        assert chunk.completion is not None
        s, n = chunk.completion.speculation, len(chunk.completion.token_ids)
        print(f"\n--- {n} tokens in {s.rounds} rounds, {s.bytes_up} bytes up and {s.bytes_down} down by {server.endpoint}")
        alone = engine.generate(PROMPT, params)[0]  # the server has given the engine back
        print("the same ids as by the target alone:", alone.token_ids == chunk.completion.token_ids)


if __name__ == "__main__":
    main()
