"""Matching against every permutation, nulls against closed forms and known facts."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsec.match import best_null, join, match, nulls, score
from fedsec.metrics import mse, psnr
from fedsec.rng import stream


def brute(guess, truth):
    """Greatest total PSNR over all one-to-one assignments, by trying them all."""
    value = torch.stack([psnr(guess, t.expand_as(guess)) for t in truth])
    if len(truth) <= len(guess):
        ways = itertools.permutations(range(len(guess)), len(truth))
        return max(sum(value[i, g].item() for i, g in enumerate(way)) for way in ways)
    ways = itertools.permutations(range(len(truth)), len(guess))
    return max(sum(value[t, g].item() for g, t in enumerate(way)) for way in ways)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_matching_is_the_best_of_all_assignments(g, b, seed):
    rng = torch.Generator().manual_seed(seed)
    guess, truth = (torch.rand(n, 1, 2, 2, generator=rng) for n in (g, b))
    perm = match(guess, truth)
    used = perm[perm >= 0].tolist()
    assert len(set(used)) == len(used) == min(g, b)
    total = sum(psnr(guess[[p]], truth[[i]]).item() for i, p in enumerate(perm.tolist()) if p >= 0)
    assert total == pytest.approx(brute(guess, truth), rel=1e-5)


def test_an_exact_guess_is_not_given_away_for_a_little_less_error():
    """Of a white and a light image the light one was found; squared error gives it to white."""
    truth = torch.stack([torch.full((1, 2, 2), v) for v in (0.9, 0.7)])
    guess = torch.stack([torch.full((1, 2, 2), v) for v in (0.7, 0.5)])
    assert match(guess, truth).tolist() == [1, 0]
    assert 0.2**2 + 0.2**2 < 0.0**2 + 0.4**2, "what squared error would have chosen"


def test_a_shuffled_batch_is_put_back_in_order():
    truth = torch.rand(9, 3, 8, 8)
    order = torch.randperm(9)
    perm = match(truth[order], truth)
    assert torch.equal(order[perm], torch.arange(9))
    assert torch.equal(match(truth[order], truth), perm)


def test_near_exact_images_are_told_apart():
    truth = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    truth[1] += 1e-7
    guess = truth.flip(0) + 1e-9
    assert match(guess, truth).tolist() == [1, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e200])
def test_a_broken_guess_is_taken_last_and_disturbs_nothing(bad):
    truth = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    guess = truth[[2, 0, 1]].clone()
    guess[1, 0, 0, 0] = bad
    assert match(guess, truth).tolist() == [1, 2, 0]
    spare = torch.cat([guess, torch.full_like(truth[:1], 0.5)])
    assert match(spare, truth).tolist() == [3, 2, 0]
    scores = score(guess, truth)
    assert not scores.psnr[0] > 0
    assert scores.psnr[1:].tolist() == [80, 80]
    assert match(torch.full_like(truth, torch.nan), truth).sort().values.tolist() == [0, 1, 2]


def test_an_original_without_a_guess_has_no_value():
    truth = torch.rand(3, 3, 16, 16)
    scores = score(truth[[2]], truth)
    assert scores.match.tolist() == [-1, -1, 0]
    for values in (scores.mse, scores.psnr, scores.ssim, scores.lpips):
        assert values.isnan().tolist() == [True, True, False]


def test_all_metrics_use_one_match():
    # mishap: each metric took its own best match. Image 0 is nearer to guess 1 in structure only.
    truth = torch.rand(4, 3, 16, 16)
    guess = (truth[[1, 3, 0, 2]] + 0.05 * torch.randn(4, 3, 16, 16)).clamp(0, 1)
    scores = score(guess, truth)
    assert scores.match.tolist() == [2, 0, 3, 1]
    assert scores.psnr.tolist() == psnr(guess[scores.match], truth).tolist()
    assert scores.mse.tolist() == mse(guess[scores.match], truth).tolist()


# ---- nulls --------------------------------------------------------------------------------------


def pool(n=40, side=16):
    return torch.rand(n, 3, side, side, generator=stream(3, "pool"))


def test_grey_and_mean_score_as_by_hand_on_every_image():
    truth, others = torch.rand(5, 3, 16, 16), pool()
    scores = nulls(truth, others.mean(0), others, stream(0, "nulls"))
    assert set(scores) == {"grey", "mean", "unrelated"}
    for name, image in (("grey", torch.full((3, 16, 16), 0.5)), ("mean", others.mean(0))):
        hand = [10 * np.log10(1 / ((t - image) ** 2).double().mean().item()) for t in truth]
        assert scores[name].psnr.tolist() == pytest.approx(hand, abs=1e-5)
        assert sorted(scores[name].match.tolist()) == [0, 1, 2, 3, 4]


def test_unrelated_images_are_matched_one_to_one_and_repeat():
    truth, others = torch.rand(5, 3, 16, 16), pool()
    first = nulls(truth, others[0], others, stream(0, "nulls"))["unrelated"]
    again = nulls(truth, others[0], others, stream(0, "nulls"))["unrelated"]
    other = nulls(truth, others[0], others, stream(1, "nulls"))["unrelated"]
    assert torch.equal(first.psnr, again.psnr)
    assert not torch.equal(first.psnr, other.psnr)
    assert sorted(first.match.tolist()) == [0, 1, 2, 3, 4]


def test_a_private_image_among_the_others_is_not_unrelated():
    others = pool(8)
    truth = others[:4]
    for seed in range(5):
        scores = nulls(truth, others.mean(0), others, stream(seed, "nulls"))["unrelated"]
        assert scores.psnr.max() < 20
    assert "unrelated" not in nulls(truth, others.mean(0), others[:7], stream(0, "nulls"))


def test_the_best_null_is_by_mean_and_the_bar_by_image():
    truth = torch.stack([torch.full((3, 16, 16), v) for v in (0.5, 0.9, 0.9)])
    scores = nulls(truth, torch.full((3, 16, 16), 0.9), truth, stream(0, "nulls"))
    name, bar = best_null(scores)
    assert name == "mean"
    assert bar.tolist() == [80, 80, 80]
    assert scores["grey"].psnr.tolist() == pytest.approx([80, 7.9588, 7.9588], abs=1e-3)


def test_nulls_of_several_batches_join_in_order():
    truth, others = torch.rand(4, 3, 16, 16), pool()
    parts = [nulls(t, others[0], others, stream(0, "nulls")) for t in truth.split(2)]
    whole = join(parts)
    assert (
        whole["grey"].psnr.tolist()
        == nulls(truth, others[0], others, stream(0, "nulls"))["grey"].psnr.tolist()
    )
    assert len(whole["unrelated"].ssim) == 4
    assert set(join([parts[0], {"grey": parts[1]["grey"]}])) == {"grey"}


def test_grey_on_cifar10_reaches_12_5_db_one_to_one_and_18_8_with_re_use():
    folder = os.environ.get("FEDSEC_DATA")
    if not folder:
        pytest.skip("FEDSEC_DATA names no folder with cifar10.npz")
    path = Path(folder)
    pixels = np.load(path if path.suffix == ".npz" else path / "cifar10.npz")["test_images"]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)[: 64 * 100] / 255
    grey = psnr(torch.full_like(images, 0.5), images).view(100, 64)
    assert grey.mean().item() == pytest.approx(12.5, abs=0.1)
    # 64 grey images that each pick the original they come nearest to all pick the same one
    assert grey.amax(1).mean().item() == pytest.approx(18.8, abs=0.3)
    assert (grey.amax(1) > 19.6).float().mean() > 0.1
    one = score(torch.full_like(images[:64], 0.5), images[:64])
    assert one.psnr.mean().item() == pytest.approx(grey[0].mean().item(), abs=1e-9)
