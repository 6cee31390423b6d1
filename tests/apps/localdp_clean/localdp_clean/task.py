"""A Flower / PyTorch app: the model and its data."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm1 = nn.GroupNorm(2, 8)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(8 * 4 * 4, 32)
        self.fc2 = nn.Linear(32, 10)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = self.pool(F.relu(self.norm1(self.conv1(x))))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc2(x) * self.temperature


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
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
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
