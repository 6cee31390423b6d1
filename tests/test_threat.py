"""The privacy boundary: exactly the granted facts, copied, and nothing private besides."""

import io
import pickle

import pytest
import torch

from fedsec.checks import Refused
from fedsec.client import Gradient, client_streams, local_update
from fedsec.defense import Compose
from fedsec.models import ConvNetSpec, norm_stats
from fedsec.rng import stream
from fedsec.threat import FACTS, Observation, ThreatModel, Withheld, admit
from fedsec.types import Batch, Exchange, Update


def exchanges(victims=2, count=2) -> list[Exchange]:
    spec = ConvNetSpec(width=2, mode="train")
    model = spec.build((3, 12, 12), 5, (0.5,) * 3, (0.25,) * 3, stream(0, "model"))
    out = []
    for v in range(victims):
        rng = stream(0, "private", v)
        images = torch.rand(count, 3, 12, 12, generator=rng)
        targets = torch.eye(5)[torch.randint(5, (count,), generator=rng)]
        batch = Batch(images, targets, tuple(range(v * count, (v + 1) * count)))
        local = Gradient(lr=0.1, batch=count).local
        rngs = client_streams(0, v, 0, "train")
        update, trained = local_update(model, [batch], Compose(()), local, rngs, count)
        pool = torch.rand(6, 3, 12, 12, generator=rng)
        pool[3] = images[0]
        out.append(
            Exchange(
                round=0,
                clients=(v,),
                model=model,
                mode="train",
                update=update,
                batch=batch,
                trained=trained,
                local=local,
                defense=Compose(()),
                norm_stats=norm_stats(model, images),
                aggregate=update,
                history=(update,),
                aux=Batch(torch.rand(4, 3, 12, 12, generator=rng), torch.eye(5)[:4]),
                candidates=Batch(pool, torch.eye(5)[[0] * 6]),
            )
        )
    return out


def granting(*grants: str) -> ThreatModel:
    return ThreatModel(grants=grants, name="honest_server")


def serialized(observation: Observation) -> bytes:
    out = io.BytesIO()
    pickle.dump({name: getattr(observation, name) for name in observation.grants}, out)
    return out.getvalue()


def holds_pixels(content: bytes, stack: list[Exchange]) -> bool:
    """Whether a row of a private image stands in `content`: as it is, normalised, or as bytes."""
    normalise = stack[0].model.normalise
    for e in stack:
        images = e.batch.images
        for shape in (images, normalise(images), 2 * images - 1):
            for kind in (torch.float32, torch.float64, torch.float16):
                rows = shape.to(kind).flatten(0, 2)
                if any(row.numpy().tobytes() in content for row in rows):
                    return True
        scaled = (255 * images).round().to(torch.uint8).flatten(0, 2)
        if any(row.numpy().tobytes() in content for row in scaled):
            return True
    return False


def test_an_observation_has_exactly_the_granted_facts():
    stack = exchanges()
    for fact in FACTS:
        seen = granting(fact).observe(stack)
        assert seen.grants == (fact,)
        for other in set(FACTS) - {fact}:
            with pytest.raises(Withheld):
                getattr(seen, other)


def test_a_withheld_fact_explains_itself():
    seen = granting("update", "count", "model", "shape").observe(exchanges())
    with pytest.raises(Withheld) as told:
        _ = seen.labels
    said = "threat=honest_server withholds 'labels'; it grants count, model, shape, update"
    assert str(told.value) == said
    with pytest.raises(AttributeError):
        _ = seen.private_images


def test_no_private_pixel_reaches_an_observation():
    stack = exchanges()
    innocent = [fact for fact in FACTS if fact != "candidates"]
    assert not holds_pixels(serialized(granting(*innocent).observe(stack)), stack)
    for fact in innocent:  # alone too: pickle shares tensors within one dump
        assert not holds_pixels(serialized(granting(fact).observe(stack)), stack), fact


def test_the_search_for_private_pixels_finds_them_where_they_are():
    stack = exchanges()
    assert holds_pixels(serialized(granting("candidates").observe(stack)), stack)


@pytest.mark.parametrize(
    "disguise",
    [
        lambda images, model: images.double(),
        lambda images, model: model.normalise(images),
        lambda images, model: (255 * images).round().to(torch.uint8),
    ],
)
def test_the_search_sees_through_disguises(disguise, monkeypatch):
    stack = exchanges()
    leaky = FACTS | {"aux": lambda stack: disguise(stack[0].batch.images, stack[0].model)}
    monkeypatch.setattr("fedsec.threat.FACTS", leaky)
    assert holds_pixels(serialized(granting("aux").observe(stack)), stack)


def test_the_models_mode_is_told_only_where_mode_is_granted():
    stack = exchanges()
    stack[0].model.eval()
    assert granting("model").observe(stack).model.training
    assert not granting("model", "mode").observe(stack).model.training
    assert not stack[0].model.training, "the exchange's own stays as it was"


def test_an_observation_knows_what_nobody_looked_at():
    seen = granting("model", "labels", "count").observe(exchanges())
    _ = seen.count
    assert seen.unread == ("labels", "model")


def test_no_private_pixel_hides_behind_a_shared_storage(monkeypatch):
    """A view would carry its whole storage along; the search sees through that."""
    stack = exchanges()
    leaky = dict(FACTS)
    leaky["count"] = lambda stack: stack[0].batch.images[:0]
    monkeypatch.setattr("fedsec.threat.FACTS", leaky)
    assert holds_pixels(serialized(granting("count").observe(stack)), stack)


def test_what_an_adversary_does_to_its_observation_changes_no_exchange():
    stack = exchanges()
    before = pickle.dumps(stack)
    seen = granting(*FACTS).observe(stack)
    with torch.no_grad():
        for parameter in seen.model.parameters():
            parameter.fill_(7)
        for buffer in seen.model.buffers():
            buffer.fill_(7)
        for tensor in (*seen.update.tensors.values(), *seen.aggregate.tensors.values()):
            tensor.fill_(7)
        for mean, var in seen.norm_stats:
            mean.fill_(7)
            var.fill_(7)
        rest = (seen.labels, seen.mixing, seen.candidates, seen.aux.images)
        for tensor in (*seen.buffers.values(), *rest):
            tensor.fill_(7)
        for update in seen.history:
            for tensor in update.tensors.values():
                tensor.fill_(7)
    assert pickle.dumps(stack) == before
    with pytest.raises(AttributeError):
        seen.count = 5


def test_facts_are_what_they_say():
    stack = exchanges()
    seen = granting(*FACTS).observe(stack)
    assert (seen.count, seen.shape, seen.mode) == (2, (3, 12, 12), "train")
    assert seen.data_range == (0.0, 1.0)
    for v, e in enumerate(stack):
        for name, tensor in e.update.tensors.items():
            assert torch.equal(seen.update.tensors[name][v], tensor)
        for name, buffer in e.update.buffers.items():
            assert torch.equal(seen.buffers[name][v], buffer)
        assert torch.equal(seen.labels[v], e.trained.targets)
        assert torch.equal(seen.mixing[v], torch.eye(2)), "nothing was mixed"
        for (mean, var), (m, s) in zip(seen.norm_stats, e.norm_stats, strict=True):
            assert torch.equal(mean[v], m)
            assert torch.equal(var[v], s)
    assert seen.update.buffers == {}, "running statistics are a fact of their own"
    assert not any(p.requires_grad for p in seen.model.parameters())


def test_admission_names_what_is_missing_and_a_way_out():
    presets = {"eavesdropper": granting("model", "update"), "rich": granting("update", "labels")}
    admit("cheap", frozenset({"update|aggregate"}), granting("aggregate"), presets)
    with pytest.raises(Refused) as told:
        admit("greedy", frozenset({"update", "labels"}), presets["eavesdropper"], presets)
    said = str(told.value)
    assert said.startswith("threat: attack=greedy needs 'labels'; use threat=rich, got ")
    assert "\n" not in said


@pytest.mark.parametrize("grants", [(), ("model", "pixels"), ("model", "model")])
def test_unknown_facts_are_refused(grants):
    with pytest.raises(Refused, match="^grants: must"):
        ThreatModel(grants=grants)


def test_sums_only():
    assert granting("model", "aggregate").sums_only
    assert not granting("update", "aggregate").sums_only


def test_update_count_is_not_the_image_count():
    """Under Poisson sampling the drawn number is private; `count` is a fact that is granted."""
    stack = exchanges()
    assert isinstance(stack[0].update, Update)
    assert granting("count").observe(stack).count == len(stack[0].batch)
