"""FFA-LoRA (arXiv 2403.12313): LoRA whose A stays as it was drawn, so that B alone is trained.

The change is then linear in what is trained. With both factors, the server's mean of A times its
mean of B is not the mean of the clients' products, and noise on both is multiplied: the term
(noise on A)(noise on B) has no counterpart in what clients meant. Half as much is sent.
"""

import dataclasses

from fedasr.models.peft.lora import KIND as LORA
from fedasr.models.peft.lora import B

KIND = dataclasses.replace(LORA, trained=lambda config: (f"{B}$",))
