"""Promise: the n-th window of a run is a pure function that visits every part of a text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import bins


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**64))
def test_permute_is_a_permutation(size, seed):
    keys = np.random.SeedSequence(seed).generate_state(bins.ROUNDS, np.uint64)
    order = bins.permute(np.arange(size, dtype=np.uint64), size, keys)
    assert sorted(order.tolist()) == list(range(size))


def test_permute_mixes():
    """Neighbours end up far apart, and another key gives another order."""
    size = 10_000
    orders = [
        bins.permute(np.arange(size, dtype=np.uint64), size, keys).astype(float)
        for keys in np.random.SeedSequence(1)
        .generate_state((2 * bins.ROUNDS), np.uint64)
        .reshape(2, -1)
    ]
    for a, b in [(orders[0][1:], orders[0][:-1]), orders, (orders[0], np.arange(size))]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05


@given(
    n_tokens=st.integers(10, 3000),
    block_size=st.integers(1, 50),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 3),
)
def test_an_epoch_reads_every_window_once(n_tokens, block_size, seed, epoch):
    length = block_size + 1
    if n_tokens < 2 * length:
        return
    per_epoch = (n_tokens - block_size) // length
    n = np.arange(per_epoch) + epoch * per_epoch
    starts = bins.window(seed, n, n_tokens, block_size)
    assert len(set(starts.tolist())) == per_epoch
    assert starts.min() >= 0 and starts.max() + length <= n_tokens
    assert len(set((starts % length).tolist())) == 1, "one phase, so no two windows overlap"


def test_epochs_differ_in_order_and_phase():
    n_tokens, block_size = 10_000, 64
    per_epoch = (n_tokens - block_size) // 65
    epochs = bins.window(7, np.arange(4 * per_epoch), n_tokens, block_size).reshape(4, -1)
    assert len({tuple(np.argsort(epoch)) for epoch in epochs}) == 4
    assert len({int(epoch[0]) % 65 for epoch in epochs}) > 1


@given(cut=st.integers(1, 399))
def test_windows_do_not_depend_on_the_batch(cut):
    n = np.arange(400)  # several epochs of a short text
    whole = bins.window(3, n, 2000, 16)
    parts = [bins.window(3, n[:cut], 2000, 16), bins.window(3, n[cut:], 2000, 16)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_windows_stay_what_they_are():
    """A run resumed with a later version of Folio must see the windows it would have seen."""
    starts = bins.window(1337, np.arange(6), 1_003_854, 64)
    assert starts.tolist() == [608464, 168024, 353729, 438034, 310959, 523574]


@pytest.mark.parametrize("n_tokens, block_size", [(2, 1), (17, 16), (100, 16), (97, 16), (65, 64)])
def test_evaluation_reads_every_target_once(n_tokens, block_size):
    tokens = np.arange(n_tokens, dtype=np.uint16)
    split = bins.Split("val.bin", tokens, n_tokens, n_tokens)
    starts = bins.eval_windows(n_tokens, block_size, n_tokens)
    idx, targets = split.batch(starts, block_size)
    counted = targets[targets != bins.IGNORED]
    assert counted.tolist() == list(range(1, n_tokens))
    assert np.array_equal(idx[targets != bins.IGNORED], counted - 1), "a target follows its id"


def test_a_limited_evaluation_is_spread_over_the_split():
    starts = bins.eval_windows(1_000_000, 100, 1000)
    assert len(starts) == 10 and len(set(np.diff(starts))) == 1
    assert starts[0] < 100_000 and starts[-1] >= 900_000
