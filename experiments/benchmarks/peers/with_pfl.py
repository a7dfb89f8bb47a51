"""pfl-research's federated averaging in PyTorch, on one thread: as many processes as cores use
several."""

import itertools
import sys

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from torch_model import Recogniser
from work import KINDS, parse, serve

work = parse(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)


def rounds(kind):
    users = {
        str(client): Dataset([torch.from_numpy(x) for x in work.data(client, steps).values()])
        for client, steps in work.own(kind).items()
    }
    sampler = get_user_sampler("minimize_reuse", list(users))
    network = Recogniser(work.dim, work.mlp, work.blocks, work.heads)
    server = torch.optim.Adam(network.parameters(), 1e-3)
    model = PyTorchModel(network, torch.optim.SGD, server)
    backend = SimulatedBackend(
        training_data=FederatedDataset(users.__getitem__, sampler), val_data=None
    )
    algorithm = FederatedAveraging()
    local = NNTrainHyperParams(
        local_batch_size=work.batch,
        local_num_epochs=1,
        local_learning_rate=0.1,
        local_max_grad_norm=1.0,
    )

    done = itertools.count(1)

    def round():
        params = NNAlgorithmParams(
            central_num_iterations=next(done),
            evaluation_frequency=10**9,  # in the first round alone, which is not timed
            train_cohort_size=len(users),
            val_cohort_size=0,
        )
        algorithm.run(
            algorithm_params=params,
            backend=backend,
            model=model,
            model_train_params=local,
            model_eval_params=NNEvalHyperParams(local_batch_size=work.batch),
            send_metrics_to_platform=False,
        )

    return round


serve({kind: rounds(kind) for kind in KINDS})
