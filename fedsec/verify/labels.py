"""Labels of batches: how many are told by an update of an untrained network."""

from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from fedsec import engine, labels
from fedsec.client import mean_gradient
from fedsec.data import Dataset
from fedsec.models import LeNetSpec, ModelSpec, ResNetSpec
from fedsec.rng import stream
from fedsec.types import Local
from fedsec.verify.claim import Claim, fresh, sent

LONG = Local(kind="fedavg", lr=0.01, steps=20, batch=32)


def instance_accuracy(found: Int[Tensor, "v b"], truth: Int[Tensor, "v b"]) -> float:
    """Share of the labels that are told, with their multiplicity: of the multisets' intersection.

    It does not start at 0: equal counts for 10 classes score 0.55, 0.80 and 0.89 at batch 8, 32 and
    128 if classes are equally frequent, and labels drawn at random 0.42, 0.69 and 0.83.
    """
    classes = 1 + int(max(found.max(), truth.max()))
    counts = [F.one_hot(named, classes).sum(1) for named in (found, truth)]
    return float(torch.minimum(*counts).sum()) / truth.numel()


def measured(
    dataset: Dataset,
    *,
    spec: ModelSpec,
    count: int,
    victims: int,
    method: str = "auto",
    local: Local | None = None,
) -> float:
    """Instance accuracy over fresh networks, one for each random batch of test images."""
    found, truth = [], []
    for v in range(victims):
        rng = stream(0, "verify", "labels", v)
        model = fresh(spec, dataset, rng)
        chosen = torch.randint(len(dataset.test), (count,), generator=rng)
        batch = dataset.test.batch(chosen, dataset.classes)
        if local is None:
            update, known = mean_gradient(model, batch), {}
        else:
            update = engine.simulate(model, batch.images, batch.targets, local)
            known = {"local": local}
        found.append(labels.recover(sent(model, [update], count, dataset, **known), method))
        truth.append(batch.labels.sort().values[None])
    return instance_accuracy(torch.cat(found), torch.cat(truth))


_row = partial(Claim, attack="inverting", unit="share")

CLAIMS: tuple[Claim, ...] = (
    _row(
        threat="eavesdropper",
        paper="Zhao et al. 2020, table 1",
        setting="labels=idlg, lenet, untrained, batch 1, 64 victims",
        published="1.000",
        measure=partial(measured, spec=LeNetSpec(), count=1, victims=64, method="idlg"),
        least=1.0,
    ),
    _row(
        threat="eavesdropper",
        paper="counts by n = B (p - gradient of the bias)",
        setting="labels=auto, resnet20, untrained, batch 8, 20 victims; equal counts: 0.55",
        published="none usable: each paper has settings of its own",
        measure=partial(measured, spec=ResNetSpec(), count=8, victims=20),
        least=0.99,
    ),
    _row(
        threat="honest_server",
        paper="Chen and Vikalo 2024",
        setting="labels=rlu, lenet, untrained, batch 32, 20 local steps, 20 victims; "
        "equal counts: 0.80",
        published="none usable: near-perfect, for networks and data that are not ours",
        measure=partial(measured, spec=LeNetSpec(), count=32, victims=20, local=LONG),
        least=0.85,
    ),
)
