"""Many asyncio tasks share the steps of one engine; one of them is cancelled in the middle."""

import asyncio
import time

from specedge import AsyncEngine, Engine, SamplingParams
from specedge.cli import DEMO

PROMPTS = [f"def {name}(values):" for name in ("mean", "median", "mode", "variance", "spread", "total", "longest", "reverse")]
PARAMS = SamplingParams(temperature=0.7, max_tokens=40, seed=1)


async def ask(served: AsyncEngine, prompt: str) -> str:
    return "".join([chunk.text async for chunk in served.stream(prompt, PARAMS)])


async def serve(engine: Engine) -> None:
    async with AsyncEngine(engine) as served:  # the engine is its own until here ...
        endless = asyncio.create_task(served.generate("while True:", SamplingParams(max_tokens=900, ignore_eos=True)))
        begun = time.perf_counter()
        texts = await asyncio.gather(*(ask(served, p) for p in PROMPTS))
        print(f"{len(texts)} texts in {time.perf_counter() - begun:.2f} s; the first:\n{PROMPTS[0]}{texts[0]}")
        endless.cancel()  # frees what it held


def main() -> None:
    with Engine.from_pretrained(DEMO / "target") as engine:
        asyncio.run(serve(engine))
        begun = time.perf_counter()
        for prompt in PROMPTS:  # ... and can be used directly again
            engine.generate(prompt, PARAMS)
        print(f"\n--- one after the other: {time.perf_counter() - begun:.2f} s")


if __name__ == "__main__":
    main()
