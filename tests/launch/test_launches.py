"""What a step asks of a GPU and its network, counted for models of any size."""

import argparse
from typing import Any

import benchmark_launches
import pytest
import torch
from shapes import MODELS, parameters
from torch import nn

from zeroadam.gather.param_bucket import ParamBucket, make_buckets, staging_bytes
from zeroadam.layout.rows import RowRules
from zeroadam.transport import Backend

MB = 2**20


def constants(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    benchmark_launches.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(("model", "millions"), [("gpt2-124m", 124), ("llama-3.2-1b", 1236), ("llama-3-8b", 8030)])
def test_sizes_are_those_that_the_models_are_known_for(model: str, millions: int) -> None:
    assert round(sum(param.numel() for param in parameters(model)) / 1e6) == millions


@pytest.mark.parametrize("wrong", ["--bandwidth=0", "--bandwidth=-5", "--latency=nan", "--tokens=-5", "--memory=inf"])
def test_constants_that_are_none(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        constants(wrong)
    assert "invalid" in capsys.readouterr().err


@pytest.mark.parametrize("model", MODELS)
def test_counts_grow_with_buckets_and_with_nothing_else(model: str) -> None:
    """One collective for each bucket of ours and of DDP's, and one for each tensor that ranks share unequally."""
    for world_size in (8, 64, 512):
        found = benchmark_launches.count(model, world_size)
        ddp = len(found["ddp buckets"])
        assert found["gathers"] <= found["buckets"] + 2
        assert found["reduces"] <= ddp + 2
        assert found["step operators"] <= 8 * found["buckets"]
        assert found["hook operators"] <= 8 * ddp
        sent = sum(found["reduced"]) + sum(found["gathered"])
        nbytes = sum(param.nbytes for param in found["params"])
        assert 2 * nbytes <= sent <= 2 * 1.12 * nbytes  # with the ends of packed rows, which are equally long
        assert found["staging"] <= 3 * (25 + 40) * MB


def test_an_estimate_follows_its_constants() -> None:
    found = benchmark_launches.count("gpt2-124m", 8)
    fast = benchmark_launches.estimate(found, 8, constants("--bandwidth", "1e9", "--latency", "0", "--launch", "0"))
    assert fast["ours"] < fast["DDP"]  # by the update of 7/8 of the parameters
    slow = benchmark_launches.estimate(found, 8, constants("--bandwidth", "1"))
    assert slow["ours"] == pytest.approx(slow["DDP"], rel=0.03)  # the same bytes, and nothing hides them
    assert slow["in forward"] <= slow["ours"]
    usual = benchmark_launches.estimate(found, 8, constants())
    assert usual["in forward"] < usual["DDP"] < usual["ours"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world_size", [2, 3, 7, 8, 48, 64, 512])
def test_staging_memory_is_at_most_three_times_the_size_of_a_bucket(model: str, world_size: int) -> None:
    buckets = make_buckets(parameters(model), 0, world_size, 25 * MB, lambda _: Backend.rules)
    assert staging_bytes(buckets) <= 3 * 25 * MB


def test_buckets_are_in_the_order_of_their_first_parameters() -> None:
    """In which a forward needs them."""
    shapes: list[Any] = [(50, 100), (7,), (100, 100), (3,), (80, 100)]
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    rules = RowRules(equal=True, direct_bytes=10_000)
    buckets: list[ParamBucket] = make_buckets(params, 0, 2, 45_000, lambda _: rules)
    positions = {id(param): position for position, param in enumerate(params)}
    assert [[positions[id(param)] for param in bucket.params] for bucket in buckets] == [[0], [1, 3], [2], [4]]
