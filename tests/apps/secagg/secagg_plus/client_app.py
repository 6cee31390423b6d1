"""A Flower / PyTorch app with a NumPyClient: the clients."""

from flwr.client import ClientApp, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.common import Context

from secagg_plus.task import Net, get_weights, load_data, set_weights, test, train


class FlowerClient(NumPyClient):
    def __init__(self, net, trainloader, valloader, epochs, lr):
        self.net, self.trainloader, self.valloader = net, trainloader, valloader
        self.epochs, self.lr = epochs, lr

    def fit(self, parameters, config):
        set_weights(self.net, parameters)
        loss = train(self.net, self.trainloader, self.epochs, self.lr)
        return get_weights(self.net), len(self.trainloader.dataset), {"train_loss": loss}

    def evaluate(self, parameters, config):
        set_weights(self.net, parameters)
        loss, accuracy = test(self.net, self.valloader)
        return loss, len(self.valloader.dataset), {"accuracy": accuracy}


def client_fn(context: Context):
    trainloader, valloader = load_data(context.node_config["partition-id"])
    epochs, lr = context.run_config["local-epochs"], context.run_config["lr"]
    return FlowerClient(Net(), trainloader, valloader, epochs, lr).to_client()


app = ClientApp(client_fn, mods=[secaggplus_mod])
