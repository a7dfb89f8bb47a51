"""The output layer alone is trained; of a transducer, all that makes one of its encoder."""

from fedasr.models.peft.kind import Kind

HEAD = r"(^|/)(output|head|lm_head|ctc_head|transducer)/"

KIND = Kind(trained=lambda config: config.patterns or (HEAD,), reads=("patterns",))
