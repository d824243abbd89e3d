"""Drawing one token per row, as numbers: temperature, truncation, mask, and the two log-probabilities."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.sampling import SampleOptions
from posttrain.sampling.draw import Allowed, draw, uniforms

P = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
LOGITS = (P.log() + 3.0)[None]  # an unnormalised shift must not matter


def one(u: float, allowed: Tensor | None = None, **options: float) -> tuple[int, float, float]:
    chosen = SampleOptions(**{"temperature": 1.0, **options})  # type: ignore[arg-type]
    tokens, full, drawn = draw(LOGITS, [chosen], [u], allowed)
    return int(tokens[0]), float(full[0].exp()), float(drawn[0].exp())


def support(**options: float) -> list[int]:
    return sorted({one(u, **options)[0] for u in np.linspace(0, 0.9999, 400)})


@pytest.mark.parametrize(
    ("u", "token"), [(0.0, 0), (0.39, 0), (0.41, 1), (0.69, 1), (0.71, 2), (0.91, 3), (0.97, 4), (0.9999999, 4)]
)
def test_the_token_is_the_one_whose_stretch_of_the_unit_line_holds_u(u: float, token: int) -> None:
    got, full, drawn = one(u)
    assert got == token
    assert full == pytest.approx(float(P[token]), abs=1e-6) == pytest.approx(drawn, abs=1e-6)


def test_greedy_takes_the_most_probable_token_and_leaves_nothing_to_chance() -> None:
    token, full, drawn = one(0.99, temperature=0.0)
    assert (token, full, drawn) == (0, pytest.approx(0.4), 1.0)


@pytest.mark.parametrize("temperature", [1e-5, 1e-7, 1e-46, 5e-324])
def test_however_cold_a_row_is_it_takes_the_best_token_it_may(temperature: float) -> None:
    for allowed, best in ((None, 0), (torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]]), 2)):
        token, full, drawn = one(0.99, allowed, temperature=temperature)
        assert (token, full, drawn) == (best, pytest.approx(float(P[best])), 1.0)


def test_temperature_changes_what_is_drawn_from_and_not_the_full_log_probability() -> None:
    cold = (P**2) / (P**2).sum()
    token, full, drawn = one(0.0, temperature=0.5)
    assert (token, full, drawn) == (0, pytest.approx(0.4), pytest.approx(float(cold[0])))
    hot = P.sqrt() / P.sqrt().sum()
    assert one(0.0, temperature=2.0)[2] == pytest.approx(float(hot[0]))


@pytest.mark.parametrize(("top_k", "kept"), [(0, [0, 1, 2, 3, 4]), (1, [0]), (3, [0, 1, 2]), (9, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_k_most_probable(top_k: int, kept: list[int]) -> None:
    assert support(top_k=top_k) == kept
    assert one(0.0, top_k=top_k)[2] == pytest.approx(float(0.4 / P[kept].sum()))


@pytest.mark.parametrize(("top_p", "kept"), [(1.0, [0, 1, 2, 3, 4]), (0.71, [0, 1, 2]), (0.69, [0, 1]), (0.39, [0]), (0.0, [0])])
def test_top_p_keeps_the_smallest_head_that_reaches_p(top_p: float, kept: list[int]) -> None:
    assert support(top_p=top_p) == kept
    assert one(0.0, top_p=top_p)[2] == pytest.approx(float(0.4 / P[kept].sum()))


def test_truncations_apply_together_and_after_the_temperature() -> None:
    assert support(top_k=2, top_p=0.95) == [0, 1]
    assert support(top_p=0.8, temperature=0.25) == [0, 1]  # p^4 puts 74 % on the first and 23 % on the second
    assert support(top_p=0.6, temperature=5.0) == [0, 1, 2]


def test_the_mask_comes_before_temperature_and_truncation_and_full_stays_unmasked() -> None:
    allowed = torch.tensor([[False, False, True, True, False]])
    token, full, drawn = one(0.0, allowed)
    assert (token, full, drawn) == (2, pytest.approx(0.2, abs=1e-6), pytest.approx(0.2 / 0.26, abs=1e-5))
    assert one(0.5, allowed, top_k=1)[0] == 2
    assert one(0.5, allowed, temperature=0.0) == (2, pytest.approx(0.2, abs=1e-6), 1.0)
    assert {one(u, allowed)[0] for u in np.linspace(0, 0.99999, 200)} == {2, 3}


def test_a_single_allowed_token_is_taken_for_any_u() -> None:
    allowed = torch.tensor([[False, False, False, False, True]])
    assert {one(u, allowed)[0] for u in (0.0, 0.3, 0.9999999)} == {4}
    assert one(0.5, allowed)[2] == 1.0


def test_rows_are_drawn_each_by_its_own_options_and_number() -> None:
    options = [SampleOptions(temperature=t, top_p=p) for t, p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.5), (2.0, 1.0))]
    numbers = [0.9, 0.95, 0.95, 0.95]
    tokens, full, drawn = draw(LOGITS.expand(4, -1), options, numbers, None)
    for row, (option, number) in enumerate(zip(options, numbers, strict=True)):
        alone = draw(LOGITS, [option], [number], None)
        assert (int(tokens[row]), float(full[row]), float(drawn[row])) == tuple(float(x) for x in alone)


def test_frequencies_follow_the_distribution_drawn_from() -> None:
    count = 20_000
    numbers = uniforms(5, count).tolist()
    tokens, _, _ = draw(LOGITS.expand(count, -1), [SampleOptions(temperature=1.0, top_k=3)] * count, numbers, None)
    seen = Counter(tokens.tolist())
    want = P[:3] / P[:3].sum()
    assert [seen[i] / count for i in range(3)] == pytest.approx(want.tolist(), abs=0.01)


def test_a_token_of_probability_zero_is_never_drawn_even_at_the_edge_of_the_unit_interval() -> None:
    logits = torch.full((1, 4000), -1e4)
    logits[0, 100:140] = torch.linspace(0, 1, 40)
    for u in (0.0, 1 - 2**-53, 0.5, 1 - 2**-24):
        tokens, _, drawn = draw(logits, [SampleOptions(temperature=1.0)], [u], None)
        assert 100 <= int(tokens[0]) < 140 and bool(drawn.isfinite().all())


def test_a_requests_numbers_depend_on_its_seed_alone() -> None:
    assert uniforms(3, 5).tolist() == uniforms(3, 9)[:5].tolist()
    assert uniforms(3, 5).tolist() != uniforms(4, 5).tolist()
    assert uniforms(2**62 - 1, 1).tolist() != uniforms(2**62 - 2, 1).tolist()


def test_a_packed_mask_unpacks_least_significant_bit_first_and_pads_with_forbidden() -> None:
    bits = np.array([[0b101, 1], [-(2**31), 0]], dtype=np.int32)
    mask = Allowed(bits, 40)
    assert mask[0].shape == (40,)
    assert mask[0].nonzero()[:, 0].tolist() == [0, 2, 32]
    assert mask[1].nonzero()[:, 0].tolist() == [31]
    assert Allowed(bits, 33)[1].shape == (33,)
    wider = Allowed(np.array([[-1]], dtype=np.int32), 50)[0]
    assert wider[:32].all() and not wider[32:].any()


def test_packed_and_spread_masks_draw_alike_whatever_else_shapes_the_row() -> None:
    """Against the plain way: forbidden logits are -inf before anything else."""
    generator, rng = torch.Generator().manual_seed(4), np.random.default_rng(4)
    options = [
        SampleOptions(9, temperature, top_p, top_k, min_p, penalty)
        for temperature, top_p, top_k, min_p, penalty in (
            (0.0, 1.0, 0, 0.0, 1.0), (1.0, 1.0, 0, 0.0, 1.0), (0.7, 0.9, 0, 0.0, 1.0), (1.3, 1.0, 7, 0.0, 1.3), (1.0, 1.0, 0, 0.05, 1.0),
        )
    ]  # fmt: skip
    context = [lambda: range(40)] * 5
    for trial in range(30):
        logits = torch.randn(5, 500, generator=generator) * 4
        bits = rng.integers(-(2**31), 2**31, (5, 16)).astype(np.int32) & rng.integers(-(2**31), 2**31, (5, 16)).astype(np.int32)
        spread = torch.stack([Allowed(bits, 500)[row] for row in range(5)])
        u = rng.random(5).tolist()
        tokens, full, drawn = draw(logits, options, u, Allowed(bits, 500), context)
        assert all(
            torch.equal(a, b) for a, b in zip((tokens, full, drawn), draw(logits, options, u, spread > 0, context), strict=True)
        )
        torch.testing.assert_close(full, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        forbidden = logits.masked_fill(spread == 0, float("-inf"))
        assert int(tokens[0]) == int(forbidden[0].argmax()), trial
        plain = draw(forbidden[1:2], options[1:2], u[1:2], None)
        assert int(tokens[1]) == int(plain[0][0]) and float(drawn[1]) == pytest.approx(float(plain[2][0]), abs=1e-5)
