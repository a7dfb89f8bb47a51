"""Federated and private Common Voice v13 (arXiv 2310.00098), by arguments.

    --config=common_voice:seed=ls100,cohort=1024,clipping=dim,sigma=10e-6

seed: "none", "ls100", "ls960" train on all users; "cv10" (any language) on 90% of them from a model
trained on the other 10%, "cv05" likewise 95% and 5%. language: en, fr, de. The others are in
`shared.ARGUMENTS`. With training=central: the seed or baseline on `split`, such as cv10.
"""

from ml_collections import ConfigDict

from fedasr.recipes import shared

# Users of the training splits, as published; "[:10%]" are the first tenth in a fixed order.
USERS = {
    "en": {"cv": 34753, "cv10": 3475, "cv90": 31278, "cv05": 1737, "cv95": 33016},
    "fr": {"cv": 6856, "cv10": 685, "cv90": 6171},
    "de": {"cv": 7127, "cv10": 712, "cv90": 6415},
}
SPLITS = {
    "cv": "train",
    "cv10": "train[:10%]",
    "cv90": "train[10%:]",
    "cv05": "train[:5%]",
    "cv95": "train[5%:]",
}
_TRAINS_ON = {"none": "cv", "ls100": "cv", "ls960": "cv", "cv10": "cv90", "cv05": "cv95"}
# Deployments that the paper names for a noise of sigma on the mean: (cohort, population).
DEPLOYMENTS = {
    3e-6: ((204_800, 69_506_000), (204_800, 6_950_600), (204_800, 695_060_000)),
    10e-6: ((204_800, 6_950_600), (204_800, 69_506_000), (102_400, 3_475_300), (51_200, 1_737_650)),
    30e-6: ((51_200, 1_737_650),),
    50e-6: ((51_200, 1_737_650),),
}


# Of the published federated configurations without clipping; a larger one has few local steps.
LARGEST_COHORT = 256


def _baseline(language: str, seed: str, split: str) -> str:
    """The published central training of a language's split from a seed, or the nearest one."""
    if split in ("cv10", "cv05"):  # of the latter there is none
        return f"cv_{language}_10"
    if seed in ("cv10", "cv05"):
        return f"cv_{language}_10_to_90"
    return {"ls100": "ls_100_to_cv", "ls960": "ls_to_cv"}.get(seed, f"cv_{language}")


def get_config(arguments: str = "") -> ConfigDict:
    """The published setting that `arguments` select."""
    known = {**shared.ARGUMENTS, "language": "en", "split": ""}
    args = shared.parse(arguments, known)
    users = shared.choose(args, "language", USERS)
    split = args["split"] or shared.choose(args, "seed", _TRAINS_ON)
    population = shared.choose({"split": split}, "split", users)
    name = f"common-voice-{args['language']}-{args['seed']}"
    baseline = _baseline(args["language"], args["seed"], split)
    config = shared.base_config(name, args, batch_seconds=120.0, baseline=baseline)
    config.data.dir = args["data"] or f"data/common_voice/{args['language']}"
    config.data.train, config.data.population = SPLITS[split], population
    config.data.eval = ("dev", "test")
    config.evaluation.while_training = ("dev",)
    if config.privacy.enabled:
        # With privacy every published run has the rates of training from a seed.
        config.rounds = args["rounds"] or 2006
        deployments = DEPLOYMENTS.get(args["sigma"], ((204_800, 69_506_000),))
        config.privacy.deployments = deployments if args["language"] == "en" else ()
    elif config.algorithm != "central" and args["cohort"] > LARGEST_COHORT:
        shared.clip_without_noise(config)
    if args["seed"] == "none" and not config.privacy.enabled:
        shared.set_rates(config, client=0.4, server=0.006, decay_start=1000, decay_rounds=500)
    else:
        shared.set_rates(config, client=0.2, server=0.002, decay_start=750, decay_rounds=750)
    if args["server_lr"]:
        config.server.learning_rate = args["server_lr"]
    return config
