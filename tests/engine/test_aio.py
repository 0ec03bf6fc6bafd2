"""AsyncEngine: tasks share the steps of one engine; each gets what it would get alone, and leaves nothing behind however it goes."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specedge.config import SamplingParams
from specedge.engine.aio import AsyncEngine, Inbox, StepError
from specedge.engine.engine import Engine
from specedge.engine.speculative import SpeculativeEngine
from specedge.engine.texts import RequestError, TextEngine, UseError
from tests.helpers import check_empty, drafter, engine, random_model

PARAMS = SamplingParams(0.9, 30, seed=5)
PROMPTS = [[i + 1] * (1 + 9 * i) for i in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"), 4)


@pytest.fixture(params=["plain", "speculative"])
def served(request: pytest.FixtureRequest, model: Path) -> TextEngine:
    return engine(model) if request.param == "plain" else SpeculativeEngine(engine(model), drafter(model))


@pytest.fixture(scope="module")
def truth(model: Path) -> list[list[int]]:
    return [engine(model).generate([p], PARAMS)[0].token_ids for p in PROMPTS]


def core(e: TextEngine) -> Engine:
    return e.engine if isinstance(e, SpeculativeEngine) else e  # type: ignore[return-value]


def counted(e: Engine) -> list[int]:
    """The rows of every forward pass from now on."""
    rows, run = list[int](), e.runner.run

    def count(batch: Any) -> Any:
        rows.append(batch.rows)
        return run(batch)

    e.runner.run = count  # type: ignore[method-assign]
    return rows


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


async def collect(a: AsyncEngine, prompt: list[int]) -> list[int]:
    return [i async for chunk in a.stream(prompt, PARAMS) for i in chunk.token_ids]


def test_many_tasks_share_the_steps(served: TextEngine, truth: list[list[int]]) -> None:
    async def main() -> None:
        async with AsyncEngine(served) as a:
            steps = counted(core(served))
            streams = [collect(a, p) for p in PROMPTS[:4]]
            wholes = [a.generate([p], PARAMS) for p in PROMPTS[4:]]
            streamed, done = await asyncio.gather(asyncio.gather(*streams), asyncio.gather(*wholes))
            assert streamed + [c.token_ids for (c,) in done] == truth
            assert len(steps) < 2 * PARAMS.max_tokens, "eight texts in about as many steps as one"
            three = await a.generate([[1], [2]], replace(PARAMS, n=3))
            assert [c.seed for c in three] == [5, 6, 7] * 2 and three[0].token_ids == truth[0]

    run(main())
    check_empty(core(served))
    assert served.generate([PROMPTS[0]], PARAMS)[0].token_ids == truth[0], "given back open"


def test_who_leaves_frees_what_it_held(served: TextEngine, truth: list[list[int]]) -> None:
    """A task that is cancelled, a generator that is closed and one that is merely dropped; the others go on."""
    async def main() -> None:
        long = replace(PARAMS, max_tokens=400)
        async with AsyncEngine(served) as a:
            stream, dropped = a.stream([5], long), a.stream([6], long)
            await anext(stream)
            await anext(dropped)
            task = asyncio.create_task(a.generate([[7], [8]], long))
            other = asyncio.create_task(collect(a, PROMPTS[2]))
            await asyncio.sleep(0)
            task.cancel()
            await stream.aclose()
            async for _ in dropped:
                break
            del dropped
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await other == truth[2]
            steps = counted(core(served))
            assert await collect(a, PROMPTS[0]) == truth[0]
            assert steps[-1] < (4 if served is core(served) else 64), "nobody else is computed any more"
            check_empty(core(served))

    run(main())


def test_a_failed_step_reaches_every_waiter(served: TextEngine, truth: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with AsyncEngine(served) as a:
            with monkeypatch.context() as patch:
                patch.setattr(core(served).runner, "run", lambda _: 1 / 0)
                failed = await asyncio.gather(*(collect(a, p) for p in PROMPTS[:3]), a.generate(PROMPTS, PARAMS), return_exceptions=True)
            assert [type(e) for e in failed] == [StepError] * 4 and len({id(e) for e in failed}) == 4
            assert "ZeroDivisionError" in str(failed[0]) and "ask again" in str(failed[0])
            check_empty(core(served))
            assert await collect(a, PROMPTS[0]) == truth[0], "the next request is served"

    run(main())


def test_what_cannot_be_served_concerns_its_task_alone(served: TextEngine, truth: list[list[int]]) -> None:
    async def main() -> None:
        async with AsyncEngine(served) as a:
            other = asyncio.create_task(collect(a, PROMPTS[3]))
            for prompt, params, kind in (([105], PARAMS, RequestError), ("text", PARAMS, RequestError), ([5], replace(PARAMS, n=2), ValueError)):
                with pytest.raises(kind):
                    await anext(a.stream(prompt, params))  # type: ignore[arg-type]
            steps = counted(core(served))
            with pytest.raises(RequestError, match="outside the vocabulary"):
                await a.generate([[5], [105]], replace(PARAMS, max_tokens=400))
            assert len(steps) < 100, "at once, and not when the first has come to its end"
            assert await other == truth[3]

    run(main())
    check_empty(core(served))


def test_close_while_requests_run(served: TextEngine) -> None:
    async def main() -> None:
        a = AsyncEngine(served)
        stream = a.stream([5], replace(PARAMS, max_tokens=400))
        await anext(stream)
        waiting = asyncio.create_task(a.generate(PROMPTS, replace(PARAMS, max_tokens=400)))
        await asyncio.sleep(0)
        await a.close()
        await a.close()
        with pytest.raises(UseError, match="closed before the text was finished"):
            await waiting
        with pytest.raises(UseError, match="closed before the text was finished"):
            async for _ in stream:
                pass
        for use in (a.generate([[5]], PARAMS), anext(a.stream([5], PARAMS))):
            with pytest.raises(UseError, match="this AsyncEngine is closed"):
                await use  # type: ignore[misc]

    run(main())
    check_empty(core(served))
    assert not [t for t in threading.enumerate() if t.name == "specedge-async"]


def test_the_engine_belongs_to_its_worker(served: TextEngine, truth: list[list[int]]) -> None:
    stale = served.stream([5], PARAMS)
    next(stale)

    async def main() -> None:
        async with AsyncEngine(served) as a:
            uses: list[Callable[[], object]] = [
                lambda: served.generate([[5]], PARAMS), lambda: next(served.stream([5], PARAMS)), served.close, lambda: AsyncEngine(served),
            ]  # fmt: skip
            for use in uses:
                with pytest.raises(UseError, match="another thread is using this engine"):
                    use()
            stale.close()  # waits for nobody, and is done in the next step
            assert await collect(a, PROMPTS[0]) == truth[0]

    run(main())
    check_empty(core(served))
    served.close()
    with pytest.raises(UseError, match="this engine is closed"):
        AsyncEngine(served)


def test_a_loop_that_has_gone_ends_its_texts(model: Path, truth: list[list[int]]) -> None:
    """The worker serves several event loops, one after the other, and does not stumble over one that was left in the middle."""
    e = engine(model)
    a = AsyncEngine(e)

    async def leave() -> None:
        a._begin([5], replace(PARAMS, max_tokens=400), Inbox())

    async def stay() -> None:
        assert await collect(a, PROMPTS[1]) == truth[1]
        await a.close()

    asyncio.run(leave())
    run(stay())
    check_empty(e)
