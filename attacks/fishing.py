"""Fishing for User Data in Large-Batch Federated Learning via Gradient Magnification."""

from dataclasses import dataclass, replace

import torch

from fedsec import cuts, engine, labels, neurons, priors, solve
from fedsec.attack import Attack
from fedsec.checks import Refused, at_least, positive, require
from fedsec.models import last_linear

SHARP = 3000.0  # logits of the fishing class for one deviation of the feature
PUBLIC = 512  # images that the feature's quantiles are taken from, where nothing public is granted


@dataclass(frozen=True, kw_only=True)
class Fishing(Attack):
    """One image's gradient out of a batch's, by a last layer of one's own (Wen et al. 2022).

    The last layer answers only to one class, whose logit is a steep step of one feature, at a cut.
    At a cut beyond all features only images of that class pass anything back: class fishing
    (section 3.2), enough where the batch holds one of them. A lower cut adds whatever lies above it
    (feature fishing, section 3.3), so the updates at two cuts differ by the images between them, of
    all classes, and the last layer's bias counts these. Where it counts one, the difference is that
    image's gradient, and is matched as in `attack=inverting`, for all such images together.

    The paper bisects on the answers, without a bound; here `queries` cuts are sent at once, at
    quantiles of the feature (a random direction, not one unit) on the public images of `aux`, or
    else on noise with the spectrum of photographs. Images that share a feature are never parted:
    it ends, and says so.
    """

    queries: int  # models sent to one client, >= 1; 1: class fishing only
    steps: int  # of the matching, >= 1
    lr: float  # length of a step, in normalised pixels, > 0
    tv: float  # weight of the total variation of normalised pixels, >= 0
    labels: str = "auto"  # how withheld ones are recovered: auto or one of labels.METHODS

    needs = frozenset({"model", "update", "queries", "count", "shape", "data_range"})

    def __post_init__(self):
        at_least(self, 1, "queries", "steps")
        at_least(self, 0, "tv")
        positive(self, "lr")
        labels.known(self.labels)

    @property
    def evaluations(self):
        return self.steps

    def check(self, model):
        name, layer = last_linear(model)
        rule = "attack=fishing needs a last layer with bias"
        require(layer.bias is not None, "model", rule, name)
        if neurons.coupled(model):
            rule = "attack=fishing needs images that do not change each other's gradients; "
            rule += "use model.mode=eval or another model.norm"
            raise Refused("model", rule, "BatchNorm in train mode")

    def craft(self, model, known, rng):
        neurons.refuse_steps("fishing", known)
        public = cuts.like_photographs(model.get_submodule("normalise"), known.shape, PUBLIC, rng)
        public = known.aux.images if "aux" in known.grants else public
        features = cuts.features(model, public)
        along = torch.randn(features.shape[1], generator=rng).to(features)
        fished = int(torch.randint(last_linear(model)[1].out_features, (), generator=rng))
        feature = features @ along
        steep = SHARP / feature.std().clamp_min(1e-12)
        places = cuts.places(feature, self.queries)
        return tuple(cuts.answering(model, fished, steep * along, -steep * c) for c in places)

    def __call__(self, seen, rngs, progress):
        targets, spent = labels.targets_of(seen, rngs, self.labels)
        fished = int(last_linear(seen.model)[1].weight.abs().sum(1).argmax())
        caught = [cuts.caught(seen, v, fished) for v in range(len(rngs))]
        rest = "the others are grey: no two cuts parted them from each other"
        each = []
        for updates, target in zip(caught, targets, strict=True):
            said = f"{len(updates)} of {seen.count} images were fished; {rest}"
            grey = solve.none(seen, seen.update.tensors, said)
            each.append(replace(grey, labels=target.argmax(-1), gflop=float(spent)))
        if any(caught):
            single, own = cuts.apart(seen, caught, rngs)
            one_hot = torch.eye(targets.shape[-1]).to(targets)[fished].expand(len(own), 1, -1)
            terms = priors.smooth(single, self.tv)
            search = engine.spectral(steps=self.steps, lr=self.lr, priors=terms)
            found = engine.match(single, one_hot, search, own, progress)
            each = cuts.dealt(each, found, caught)
        return solve.stacked(each)
