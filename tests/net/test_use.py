"""Server and Edge as parts of a program: who holds what and until when, several completions, and what does not cross the network."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from specedge.config import DraftConfig, EngineConfig, SamplingParams
from specedge.engine.engine import Engine
from specedge.engine.texts import UseError
from specedge.net.client import ServerError
from specedge.net.edge import Edge
from specedge.net.server import Server
from tests.helpers import byte_tokenizer, check_empty, drafter, engine, random_model

PARAMS = SamplingParams(1.0, 16, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"), 4, byte_tokenizer(), vocab_size=257)


@pytest.fixture
def target(model: Path) -> Iterator[Engine]:
    e = engine(model)
    yield e
    check_empty(e)


def test_a_server_holds_its_engine_and_gives_it_back(target: Engine) -> None:
    want = target.generate([[5]], PARAMS)[0].token_ids
    server = Server(target)
    assert target.generate([[5]], PARAMS)[0].token_ids == want, "until it starts"
    with server:
        with pytest.raises(UseError, match="another thread is using this engine"):
            target.generate([[5]], PARAMS)
        with pytest.raises(UseError, match="another thread is using this engine"), Server(target):
            pass
    assert target.generate([[5]], PARAMS)[0].token_ids == want


def test_log_probabilities_stay_at_home(target: Engine) -> None:
    """A ValueError that names the field, before anything is sent: nothing arrives at the server."""
    with Server(target) as server, Edge(server.address) as edge:
        for ask in (lambda p: edge.generate([[5]], p), lambda p: next(edge.stream([5], p))):
            with pytest.raises(ValueError, match="^logprobs is 0, but must be None here: only token ids cross the network"):
                ask(replace(PARAMS, logprobs=0))
        assert target.line.opened == 0 and len(server._sessions) == 0


def test_several_completions_over_the_network(target: Engine, model: Path) -> None:
    want = target.generate([[5, 6], [7]], replace(PARAMS, n=3))
    with Server(target) as server, Edge(server.address, drafter(model)) as edge:
        over = edge.generate([[5, 6], [7]], replace(PARAMS, n=3))
        assert [(c.token_ids, c.seed, c.prompt_tokens) for c in over] == [(c.token_ids, c.seed, c.prompt_tokens) for c in want]
        with pytest.raises(ValueError, match="^n is 3, but must be 1 for a stream"):
            next(edge.stream([5], replace(PARAMS, n=3)))


def test_an_edge_closes_the_draft_that_it_loaded(target: Engine, model: Path) -> None:
    given = drafter(model)
    with Server(target) as server:
        with Edge(server.address, model, config=DraftConfig(engine=EngineConfig(kv_tokens=512)), device="cpu") as edge:
            loaded = edge._loaded
            assert loaded is not None and edge.generate([[5]], PARAMS)
        edge.close()
        assert loaded.closed and not hasattr(loaded, "runner")
        with pytest.raises(ServerError, match="this edge is closed"):
            edge.generate([[5]], PARAMS)
        with Edge(server.address, given) as edge:
            edge.generate([[5]], PARAMS)
    assert not given.closed


def test_a_closed_engine_is_not_served(model: Path) -> None:
    e = engine(model)
    e.close()
    server = Server(e)
    with pytest.raises(UseError, match="this engine is closed"):
        server.start()
    server.close()
