"""From a configuration to the objects of a run, one module a part.

This is the only package that reads a configuration: everything below `fedasr.training` takes plain
objects. Each module checks what it reads (`check`), `whole.checked` asks all of them.

* `models`: the recogniser, and which of its variables are trained, shared or local
* `corpora`: the data, its shapes and its alphabet; `batches`: how much of it at a time
* `optimizers`: of clients, server and central training; `clients`: what a client does in a round
* `mechanisms`: sampling and privacy; `identities`: what tells a run from all others
* `simulations`: the federated rounds; `pooled`: central training; `devices`: what both run on
"""
