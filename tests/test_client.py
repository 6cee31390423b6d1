"""What a client computes, against plain loops, and what it must leave alone."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedsec.checks import Refused
from fedsec.client import (
    FedAvg,
    Gradient,
    buffers,
    client_streams,
    draw,
    local_update,
    mean_gradient,
    mean_update,
    parameters,
    schedule,
    weights_after,
)
from fedsec.defense import Defense
from fedsec.models import BatchNorm2d
from fedsec.types import Batch, Update

RNGS = client_streams(0, 1, 2, "train")


def network(norm: type[nn.Module] = BatchNorm2d, extra: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), extra or nn.Identity(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 4 * 4, 5))


def batch(n: int, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (n,), generator=rng)
    images = torch.rand(n, 3, 6, 6, generator=rng)
    return Batch(images, F.one_hot(labels, 5).float(), tuple(range(n)))


@dataclass(frozen=True)
class Noise(Defense):
    scale: float = 100.0

    def update(self, update, rng):
        noisy = {
            k: t + self.scale * torch.randn(t.shape, generator=rng)
            for k, t in update.tensors.items()
        }
        return Update(noisy, update.buffers, update.count)


@dataclass(frozen=True)
class Poisson(Defense):
    poisson = True


def test_mean_gradient_is_the_backward_pass_on_mixed_targets():
    model, mixed = network(), batch(6)
    mixed = Batch(mixed.images, 0.7 * mixed.targets + 0.3 * mixed.targets.flip(0))
    logs = F.log_softmax(model(mixed.images), 1)
    (-(mixed.targets * logs).sum(1).mean()).backward()
    grads = mean_gradient(model, mixed)
    assert list(grads) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)
        assert not grads[name].requires_grad


def test_untouched_and_frozen_parameters_and_an_empty_batch():
    model = network()
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    model[0].weight.requires_grad_(False)
    grads = mean_gradient(model, batch(2))
    assert grads["unused"].eq(0).all()
    assert "0.weight" not in grads
    assert grads["5.weight"].ne(0).any()
    before = buffers(model)["1.running_mean"].clone()
    update, _ = local_update(model, [batch(0)], Poisson(), Gradient(lr=1.0, batch=4).local, RNGS, 4)
    assert all(g.eq(0).all() for g in update.tensors.values())
    assert torch.equal(update.buffers["1.running_mean"], before)
    assert update.count == 4


def test_local_steps_are_plain_sgd_and_move_running_statistics_as_torch_does():
    spec, model, twin = FedAvg(lr=0.1, batch=4, steps=3), network(), network(nn.BatchNorm2d)
    batches = [batch(4, s) for s in range(3)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    update, trained = local_update(model, batches, Defense(), spec.local, RNGS, 4)

    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for b in batches:
        optimizer.zero_grad()
        F.cross_entropy(twin(b.images), b.labels).backward()
        optimizer.step()
    after = twin.state_dict()
    for name, tensor in update.tensors.items():
        torch.testing.assert_close(before[name] - tensor, after[name])
        assert tensor.ne(0).any() or name == "0.bias"  # BatchNorm takes the bias's gradient away
    assert set(update.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    for name, buffer in update.buffers.items():
        torch.testing.assert_close(buffer, after[name])
    assert update.count == 12
    assert torch.equal(trained.images, torch.cat([b.images for b in batches]))
    for name, value in model.state_dict().items():  # the server's model is only read
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in model.parameters())


def test_in_eval_mode_running_statistics_stay():
    model = network().eval()
    update, _ = local_update(model, [batch(4)], Defense(), Gradient(lr=1.0, batch=4).local, RNGS, 4)
    assert all(torch.equal(b, buffers(model)[k]) for k, b in update.buffers.items())


def test_an_update_depends_on_its_arguments_only():
    model, spec = network(extra=nn.Dropout(0.5)), Gradient(lr=1.0, batch=4)

    def update(rngs=RNGS):
        return local_update(model, [batch(4)], Defense(), spec.local, rngs, 4)[0].tensors

    first = update()
    state = torch.get_rng_state()
    torch.rand(5)
    second = update()
    assert all(torch.equal(first[k], second[k]) for k in first)
    torch.set_rng_state(state)
    update()
    assert torch.equal(torch.get_rng_state(), state)
    other = update(client_streams(0, 1, 3, "train"))
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("spec", [Gradient(lr=1.0, batch=4), FedAvg(lr=0.1, batch=4, steps=1)])
def test_noise_reaches_the_update_that_is_sent(spec):
    """Mishap 1: with noise multiplier 100 the attacked gradient differed by 0.0."""
    plain, _ = local_update(network(), [batch(4)], Defense(), spec.local, RNGS, 4)
    noisy, _ = local_update(network(), [batch(4)], Noise(), spec.local, RNGS, 4)
    rng = RNGS("update", 0)
    for name, tensor in plain.tensors.items():
        expected = tensor + 100 * torch.randn(tensor.shape, generator=rng)
        torch.testing.assert_close(noisy.tensors[name], expected, rtol=1e-4, atol=1e-4)
        assert (noisy.tensors[name] - tensor).abs().mean() > 10


def test_a_hook_that_draws_more_shifts_no_other():
    @dataclass(frozen=True)
    class Greedy(Noise):
        def batch(self, batch, rng):
            torch.rand(1000, generator=rng)
            return batch

    one, two = (
        local_update(network(), [batch(4)], d, Gradient(lr=1.0, batch=4).local, RNGS, 4)[0]
        for d in (Noise(), Greedy())
    )
    assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors)


def test_what_the_server_recovers_from_the_weights_is_the_update():
    model, spec = network(), FedAvg(lr=0.1, batch=4, steps=2)
    update, _ = local_update(model, [batch(4), batch(4, 1)], Noise(), spec.local, RNGS, 4)
    after = weights_after(model, update)
    for name, p in parameters(model).items():
        assert torch.equal(p.detach() - after[name], update.tensors[name])


def test_draws_are_without_replacement_then_anew():
    held, spec = torch.arange(100, 111), FedAvg(lr=1.0, batch=4, steps=5)
    steps = draw(spec, held, 0, 0, 0, Defense())
    assert [len(s) for s in steps] == [4] * 5
    assert len(set(torch.cat(steps[:2]).tolist())) == 8  # 11 images: two whole batches
    assert all(len(set(s.tolist())) == 4 for s in steps)
    assert set(torch.cat(steps).tolist()) <= set(held.tolist())
    again = draw(spec, held, 0, 0, 0, Defense())
    assert all(torch.equal(a, b) for a, b in zip(steps, again, strict=True))
    for other in (
        draw(spec, held, 1, 0, 0, Defense()),
        draw(spec, held, 0, 1, 0, Defense()),
        draw(spec, held, 0, 0, 1, Defense()),
    ):
        assert not torch.equal(torch.cat(steps), torch.cat(other))
    small = draw(Gradient(lr=1.0, batch=32), held, 0, 0, 0, Defense())
    assert sorted(small[0].tolist()) == held.tolist()


def test_poisson_draws_each_image_on_its_own():
    held, spec = torch.arange(50), Gradient(lr=1.0, batch=5)
    draws = [draw(spec, held, r, 0, 0, Poisson())[0] for r in range(400)]
    sizes = torch.tensor([float(len(d)) for d in draws])
    assert abs(sizes.mean() - 5) < 4 * (50 * 0.1 * 0.9 / 400) ** 0.5
    assert abs(sizes.var() - 4.5) < 1.5  # binomial; without replacement it would be 0
    counts = torch.bincount(torch.cat(draws), minlength=50)
    assert counts.min() > 10
    assert counts.max() < 80
    assert any(len(draw(Gradient(lr=1.0, batch=1), held, r, 0, 0, Poisson())[0]) == 0
               for r in range(20))  # fmt: skip


def test_the_count_does_not_tell_what_poisson_sampling_drew():
    local = Gradient(lr=1.0, batch=5).local
    counts = {
        local_update(network(), [batch(n)], Poisson(), local, RNGS, 5)[0].count for n in (0, 3, 9)
    }
    assert counts == {5}


@pytest.mark.parametrize(
    ("count", "size", "steps", "plain"),
    [
        (1, 4, 3, [[0], [0], [0]]),
        (5, 2, 4, [[0, 1], [2, 3], [4], [0, 1]]),
        (4, 2, 3, [[0, 1], [2, 3], [0, 1]]),
        (3, 3, 1, [[0, 1, 2]]),
    ],
)
def test_a_probe_cycles_through_its_images(count, size, steps, plain):
    spec = FedAvg(lr=1.0, batch=size, steps=steps)
    assert [s.tolist() for s in schedule(count, spec.local)] == plain
    at_once = schedule(count, Gradient(lr=1.0, batch=size).local)
    assert [s.tolist() for s in at_once] == [list(range(count))]


@pytest.mark.parametrize("spec", [Gradient(lr=0.1, batch=2), FedAvg(lr=0.1, batch=2, steps=4)])
def test_an_attack_simulates_the_very_same_update(spec):
    from fedsec.engine import simulate

    model, private = network(), batch(5)
    steps = [Batch(private.images[i], private.targets[i]) for i in schedule(5, spec.local)]
    update, _ = local_update(model, steps, Defense(), spec.local, RNGS, 2)
    simulated = simulate(model, private.images, private.targets, spec.local)
    for name, tensor in update.tensors.items():
        torch.testing.assert_close(simulated[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_mean_is_the_plain_formula():
    """Mishap 9: a mean over users whose weights were .105, .141, .188, .250."""
    counts = (1, 2, 3, 4)
    updates = [
        Update({"w": torch.full((2,), float(i))}, {"n": torch.tensor(10 * i)}, c)
        for i, c in enumerate(counts)
    ]
    mean = mean_update(updates)
    torch.testing.assert_close(mean.tensors["w"], torch.full((2,), 0 * 0.1 + 0.2 + 0.6 + 1.2))
    assert mean.buffers["n"].item() == 20
    assert mean.buffers["n"].dtype == torch.int64
    assert mean.count == 10
    same = [replace(u, buffers={"n": torch.tensor(7)}, count=c) for u, c in zip(
        updates, (7, 11, 13, 3), strict=True)]  # fmt: skip
    assert mean_update(same).buffers["n"].item() == 7  # not 6, by rounding down


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        (lambda: Gradient(lr=0.0, batch=1), "lr"),
        (lambda: Gradient(lr=1.0, batch=0), "batch"),
        (lambda: FedAvg(lr=-1.0, batch=1, steps=1), "lr"),
        (lambda: FedAvg(lr=1.0, batch=0, steps=1), "batch"),
        (lambda: FedAvg(lr=1.0, batch=1, steps=0), "steps"),
        (lambda: Gradient(lr=float("nan"), batch=1), "lr"),
        (lambda: FedAvg(lr=float("inf"), batch=1, steps=1), "lr"),
    ],
)
def test_refusals(spec, key):
    with pytest.raises(Refused) as refused:
        spec()
    assert refused.value.key == key
