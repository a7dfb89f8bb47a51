"""Flower's simulation: clients in Ray actors of one core and one PyTorch thread each.

Its rounds begin and end within one run of the simulation, so the strategy takes the commands.
"""

import logging
import sys

import torch
from flwr.client import ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation
from torch_model import Recogniser
from work import KINDS, Work, parse

MANY = 1_000_000  # rounds: until stdin ends


def make_model(work: Work) -> Recogniser:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Recogniser(work.dim, work.mlp, work.blocks, work.heads)


def values(model: Recogniser) -> list:
    return [value.detach().numpy() for value in model.state_dict().values()]


class Client(NumPyClient):
    def __init__(self, work: Work, number: int) -> None:
        self.work, self.number = work, number

    def fit(self, parameters, config):
        """One epoch of SGD over the client's utterances."""
        model = make_model(self.work)
        names = list(model.state_dict())
        given = [torch.from_numpy(value.copy()) for value in parameters]
        model.load_state_dict(dict(zip(names, given, strict=True)))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        steps = self.work.client_steps(config["kind"])[self.number]
        data = {n: torch.from_numpy(x) for n, x in self.work.data(self.number, steps).items()}
        size = self.work.batch
        for i in range(0, steps * size, size):
            optimizer.zero_grad()
            model.loss(data["features"][i : i + size], data["labels"][i : i + size]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return values(model), steps * size, {}


class Commanded(FedAvg):
    """Federated averaging that waits for a command before each round."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.warm_up = [*KINDS, *KINDS]

    def configure_fit(self, server_round, parameters, client_manager):
        """Chooses everybody, with the kind of round."""
        if self.warm_up:
            kind = self.warm_up.pop(0)
        else:
            print("ready" if server_round == 2 * len(KINDS) + 1 else "done", flush=True)
            kind = sys.stdin.readline().strip()
            if not kind:
                sys.exit(0)
        self.on_fit_config_fn = lambda number: {"kind": kind}
        return super().configure_fit(server_round, parameters, client_manager)


def main() -> None:
    """Runs the simulation."""
    text = sys.argv[1]
    work = parse(text)
    logging.getLogger("flwr").setLevel(logging.ERROR)

    def client_fn(context):
        number = int(context.node_config["partition-id"])
        return Client(parse(text), number).to_client()

    strategy = Commanded(
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_fit_clients=work.clients,
        min_available_clients=work.clients,
        initial_parameters=ndarrays_to_parameters(values(make_model(work))),
    )

    def server_fn(context):
        del context
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=MANY))

    run_simulation(
        ServerApp(server_fn=server_fn),
        ClientApp(client_fn=client_fn),
        num_supernodes=work.clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    main()
