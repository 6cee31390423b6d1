"""A Flower / PyTorch app with a NumPyClient: the server."""

from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg

from numpyclient_clean.task import Net, get_weights


def server_fn(context: Context):
    parameters = ndarrays_to_parameters(get_weights(Net()))
    strategy = FedAvg(fraction_fit=1.0, min_available_clients=2, initial_parameters=parameters)
    config = ServerConfig(num_rounds=context.run_config["num-server-rounds"])
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)
