"""Equal inputs give equal bits where a recipe asks for it, and torch is left as it was found."""

import os

import pytest
import torch

from data_pipeline.errors import ConfigError
from t2v import loop
from t2v.engine.compute import determinism
from t2v.engine.config import EngineConfig
from tests.test_loop import (
    TRUTH,
    assert_same_tensors,
    config_of,
    dataset,
    leave_no_handlers,
    lines_of,
    tensors_at,
)

__all__ = ["dataset", "leave_no_handlers"]
ON, OFF = (EngineConfig(kind="single", deterministic=wanted) for wanted in (True, False))


def any_order() -> None:
    """An operation whose result depends on who comes last, and which torch has no other way for."""
    torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def settings() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        cudnn.deterministic,
        cudnn.benchmark,
    )


@pytest.fixture
def others(monkeypatch):
    """torch as a program around ours might have set it."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    found, cudnn = settings(), torch.backends.cudnn
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.benchmark = True
    yield settings()
    torch.use_deterministic_algorithms(found[0], warn_only=found[1])
    cudnn.benchmark = found[4]


def test_what_cannot_be_deterministic_is_an_error_only_where_it_was_asked_for():
    with determinism(ON), pytest.raises(RuntimeError, match="deterministic"):
        any_order()
    with determinism(OFF):
        any_order()
    any_order()


@pytest.mark.parametrize("config", [ON, OFF], ids=["on", "off"])
def test_torch_is_left_as_it_was_even_by_an_error(config, others):
    wanted, found = config.deterministic, []

    def inside() -> None:
        with determinism(config):
            found.append((*settings(), "CUBLAS_WORKSPACE_CONFIG" in os.environ))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        inside()
    assert found == [(wanted, False, False, wanted, not wanted, wanted)]
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert settings() == others


def test_a_cublas_that_sums_in_any_order_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError) as refused, determinism(ON):
        pass
    assert str(refused.value) == (
        "CUBLAS_WORKSPACE_CONFIG: ':0:0' is wrong because engine.deterministic needs sums of one "
        "order; unset it, or set engine.deterministic: false."
    )
    with determinism(OFF):
        pass
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_obeys_its_recipe_and_a_cpu_gives_the_same_bits(dataset, tmp_path, monkeypatch):
    seen, fault = {True: set(), False: set()}, loop.fault
    for wanted in (True, False):

        def noted(site, step=0, wanted=wanted):
            seen[wanted].add(torch.are_deterministic_algorithms_enabled())
            return fault(site, step)

        monkeypatch.setattr(loop, "fault", noted)
        engine = {"deterministic": wanted}
        assert loop.train(config_of(dataset, tmp_path / str(wanted), engine=engine)) == 0
    assert seen == {True: {True}, False: {False}}
    assert lines_of(tmp_path / "True", *TRUTH) == lines_of(tmp_path / "False", *TRUTH)
    assert_same_tensors(tensors_at(tmp_path / "True", 6), tensors_at(tmp_path / "False", 6))
