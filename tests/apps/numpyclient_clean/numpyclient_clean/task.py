"""A Flower / PyTorch app: the model and its data."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 48, bias=False)
        self.fc2 = nn.Linear(48, 10, bias=False)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


def load_data(partition_id: int, batch_size: int = 16):
    """Stripes of ten kinds with noise, made here in place of a download."""
    size = 64
    rng = torch.Generator().manual_seed(partition_id)
    labels = torch.randint(10, (size + 20,), generator=rng)
    noise = torch.rand(len(labels), 1, 8, 8, generator=rng)
    images = 0.5 * noise + 0.05 * labels.view(-1, 1, 1, 1)
    trained = TensorDataset(images[:size], labels[:size])
    tested = TensorDataset(images[size:], labels[size:])
    return DataLoader(trained, batch_size=batch_size, shuffle=True), DataLoader(tested, 20)


def train(net, loader, epochs, lr):
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    running_loss = 0.0
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(net(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / (epochs * len(loader))


def test(net, loader):
    net.eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for images, labels in loader:
            outputs = net(images)
            loss += F.cross_entropy(outputs, labels, reduction="sum").item()
            correct += (outputs.argmax(1) == labels).sum().item()
    return loss / len(loader.dataset), correct / len(loader.dataset)


def get_weights(net):
    return [values.cpu().numpy() for values in net.state_dict().values()]


def set_weights(net, parameters):
    names = net.state_dict().keys()
    values = {k: torch.tensor(v) for k, v in zip(names, parameters, strict=True)}
    net.load_state_dict(values, strict=True)
