"""What the audit's tap adds to an app: seconds, and bytes of a recording on the disk.

    python benchmarks/audit.py [--model resnet18] [--rounds 5] [--clients 10] [--recorded 50]

An app whose clients train a convolutional network on noise runs on the bare inline grid and on the
audited one, in turn; process CPU time, of which the least of all turns counts. Then its messages
are recorded under a limit, as resnet18's of 50 rounds and 10 clients would be.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedsec.audit import tap
from fedsec.audit.app import App
from fedsec.audit.claims import Heard
from fedsec.audit.traffic import Recording
from fedsec.flower import InlineGrid, name_this_process, silent

BATCH, STEPS = 16, 4


def network(kind: str) -> nn.Module:
    if kind == "resnet18":
        from torchvision.models import resnet18

        return resnet18(num_classes=10)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(784, 10)
    )


def app(kind: str, rounds: int, trains: bool) -> App:
    server, client = ServerApp(), ClientApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord(network(kind).state_dict())
        strategy = FedAvg(fraction_evaluate=0.0)
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds)

    @client.train()
    def train(message: Message, context: Context) -> Message:
        model = network(kind).train()
        record = message.content.array_records["arrays"]
        model.load_state_dict(record.to_torch_state_dict())
        optimiser = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(STEPS if trains else 0):
            images, labels = torch.rand(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
            optimiser.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimiser.step()
        if not trains:  # another update for each client, at no cost
            next(model.parameters()).data.add_(torch.rand(1))
        metrics = MetricRecord({"num-examples": BATCH})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return App("benchmark", Path.cwd(), server, client, {}, 4)


def bare(asked: argparse.Namespace) -> float:
    """CPU seconds of the app alone."""
    ready = app(asked.model, asked.rounds, True)
    name_this_process()
    torch.manual_seed(0)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    start = time.process_time()
    with silent():
        ready.server(InlineGrid(ready.client, asked.clients), context)
    return time.process_time() - start


def audited(asked: argparse.Namespace, **more: Any) -> float:
    """CPU seconds of the app behind the tap."""
    heard = Heard()
    with heard.listening():
        ready = app(asked.model, asked.rounds, True)
    limits = {"seed": 0, "limit": 10**9, "patience": 600.0}
    start = time.process_time()
    tap.run(ready, heard, clients=asked.clients, rounds=0, **limits, **more)
    return time.process_time() - start


def recorded(asked: argparse.Namespace) -> tuple[int, int]:
    """Bytes on the disk of 50 rounds of 10 clients of resnet18, and bytes that travelled."""
    folder = Path(tempfile.mkdtemp(prefix="fedsec-")) / "record"
    heard = Heard()
    with heard.listening():
        ready = app("resnet18", asked.recorded, False)
    limit = asked.limit * 10**6
    try:
        traffic, _ = tap.run(
            ready, heard, clients=10, rounds=0, seed=0, limit=limit, patience=600.0,
            recording=lambda about: Recording(folder, about, limit),
        )  # fmt: skip
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return size, sum(m.size for m in traffic.messages)
    finally:
        shutil.rmtree(folder.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="convolutions", choices=("convolutions", "resnet18"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--recorded", type=int, default=0, help="rounds of resnet18 to record")
    parser.add_argument("--limit", type=int, default=2000, help="MB")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bare(asked)  # warm
    pairs = [(bare(asked), audited(asked)) for _ in range(asked.turns)]
    alone, tapped = (min(each) for each in zip(*pairs, strict=True))
    print(
        f"{asked.model}, {asked.clients} clients, {asked.rounds} rounds, {STEPS} steps of {BATCH}"
    )
    print(f"alone {alone:.2f} s, audited {tapped:.2f} s: {100 * (tapped / alone - 1):+.1f} %")
    if asked.recorded:
        size, travelled = recorded(asked)
        print(f"recorded {asked.recorded} rounds of 10 clients of resnet18 under a limit of "
              f"{asked.limit} MB: {size / 1e6:.0f} MB on the disk, of {travelled / 1e6:.0f} MB "
              "that travelled")  # fmt: skip


if __name__ == "__main__":
    main()
