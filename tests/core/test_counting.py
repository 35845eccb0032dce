"""Scopes that count calls belong to a thread and end with it; copies have scopes of their own."""

from __future__ import annotations

import copy
import threading

import torch

import invflow
from invflow.operators import Denoising


def small() -> invflow.NeuralFlowMap:
    return invflow.NeuralFlowMap((1, 8, 8), options={"channels": [8, 16], "blocks": 1, "attention": False})


def test_a_copy_neither_shares_scopes_nor_piles_them_up() -> None:
    prior = small()
    x = torch.zeros(3, 1, 8, 8)
    with prior.count() as calls:
        other = copy.copy(prior)
        other.velocity(x, 0.5)
        assert calls.forward == 0
    with other.count() as own:
        assert len(other.call_scopes()) == 1
        assert prior.call_scopes() == []
        prior.velocity(x, 0.5)
        other.velocity(x, 0.5)
    assert own.forward == 3
    assert other.call_scopes() == []


def test_calls_of_a_resized_copy_are_the_maps_too() -> None:
    prior = small()
    for _ in range(2):
        with prior.count() as calls:
            larger = prior.resized((1, 16, 8))
            with larger.count() as own:
                prior.velocity(torch.zeros(2, 1, 8, 8), 0.5)
                larger.velocity(torch.zeros(3, 1, 16, 8), 0.5)
        assert (calls.forward, own.forward) == (5, 3)


def test_cost_on_another_size_is_the_same_the_second_time() -> None:
    likelihood = invflow.GaussianLikelihood(Denoising((1, 16, 8)), torch.full((1, 1, 16, 8), 0.5), 0.1)
    solver = invflow.PlugAndPlay(small(), steps=4)
    assert [solver.sample(likelihood, 1).nfe.forward for _ in range(3)] == [1, 1, 1]  # white noise: one call


def test_threads_count_what_is_theirs() -> None:
    prior, start, found = small(), threading.Barrier(4), {}

    def work(k: int) -> None:
        start.wait()
        for _ in range(20):
            with prior.count() as calls:
                for _ in range(k):
                    prior.velocity(torch.zeros(1, 1, 8, 8), 0.5)
            found.setdefault(k, set()).add(calls.forward)

    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: {k} for k in (1, 2, 3, 4)}


def test_a_generator_closed_in_another_thread_leaves_no_scope_open() -> None:
    prior = small()

    def counted():  # type: ignore[no-untyped-def]
        with prior.count():
            yield

    steps = counted()
    next(steps)
    closing = threading.Thread(target=steps.close)
    closing.start()
    closing.join()
    assert prior.call_scopes() == []
