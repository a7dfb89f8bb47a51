"""Every row of the published tables (arXiv 2310.00098) that has its setting stated, as a run.

    fedasr sweep --table=published_privacy --action=slurm

Rows without figures are settings that the paper studies but whose numbers we do not have. Rows with
a seed start from the table's seed models, which are trained centrally first. The prepared corpora
are expected in data/librispeech and data/common_voice/LANGUAGE (links will do). The learning rates
of other server optimisers than LAMB are in no public configuration: those rows choose from a grid
of ours. What differs from what was published is in docs/fidelity.md.
"""

from fedasr.recipes.tables import Row, Table

_LS = "librispeech"
_CV = "common_voice"
_TITLE = "(arXiv 2310.00098)"

# Central training on the seeds' own data, by the seed's name.
_LS_STARTS = {
    "ls100": Row("LS-100 seed", {}, arguments="training=central,split=ls100"),
    "cv": Row(
        "CV-en seed",
        {
            "data.dir": "data/common_voice/en",
            "data.train": "train",
            "data.population": 34753,
            "data.eval": ("dev", "test"),
        },
        arguments="training=central,baseline=cv_en",
    ),
}
_CV_STARTS = {
    "ls100": Row(
        "LS-100 seed",
        {"data.dir": "data/librispeech", "data.train": "ls100", "data.population": 251},
        arguments="training=central,baseline=ls_100",
    ),
    "ls960": Row(
        "LS-960 seed",
        {"data.dir": "data/librispeech", "data.train": "ls960", "data.population": 2338},
        arguments="training=central,baseline=ls",
    ),
    "cv10": Row("CV-10 seed", {}, {"test": 27.9}, arguments="training=central,split=cv10"),
    "cv05": Row("CV-05 seed", {}, arguments="training=central,split=cv05"),
}


def _librispeech() -> Table:
    clean_other = {
        "none": {8: (6.7, 17.5), 16: (5.1, 13.7), 32: (4.2, 11.1), 64: (3.4, 8.8)},
        "ls100": {8: (3.4, 9.0), 16: (3.2, 8.3), 32: (3.0, 7.6), 64: (2.9, 7.1)},
        "cv": {8: (4.3, 10.3), 16: (3.8, 9.4), 32: (3.5, 8.6), 64: (3.2, 7.8)},
    }
    central = {"none": (2.8, 6.8), "ls100": (2.9, 6.8), "cv": (3.2, 7.2)}
    rows = []
    for seed, figures in clean_other.items():
        start = _LS_STARTS[seed].name if seed != "none" else ""
        for cohort, (clean, other) in figures.items():
            rows.append(
                Row(
                    f"seed {seed}, cohort {cohort}",
                    {},
                    {"test_clean": clean, "test_other": other},
                    start=start,
                    series=f"seed {seed}",
                    x=cohort,
                    arguments=f"seed={seed},cohort={cohort}",
                )
            )
        clean, other = central[seed]
        rows.append(
            Row(
                f"seed {seed}, central",
                {},
                {"test_clean": clean, "test_other": other},
                start=start,
                arguments=f"seed={seed},training=central",
            )
        )
    return Table(
        name="published_librispeech",
        title=f"Federated LibriSpeech by seed and cohort, no privacy {_TITLE}",
        config=_LS,
        rows=tuple(rows),
        select="dev_clean",
        report=("test_clean", "test_other"),
        starts=tuple(_LS_STARTS.values()),
        expected="a larger cohort is better, a seed is better",
        x_label="users a round",
        log_x=True,
    )


def _common_voice() -> Table:
    cohorts = (8, 16, 32, 64, 128, 256)
    test = {
        "none": (66.7, 56.5, 46.3, 38.0, 31.9, 25.7, 18.2),
        "ls100": (28.8, 26.3, 23.9, 22.0, 20.2, 18.9, 17.8),
        "ls960": (23.5, 21.6, 20.2, 18.8, 17.6, 16.6, 17.2),
        "cv10": (24.4, 22.8, 21.5, 20.1, 19.1, 18.0, 17.6),
    }
    rows = []
    for seed, figures in test.items():
        start = _CV_STARTS[seed].name if seed != "none" else ""
        for cohort, figure in zip(cohorts, figures[:-1], strict=True):
            rows.append(
                Row(
                    f"seed {seed}, cohort {cohort}",
                    {},
                    {"test": figure},
                    start=start,
                    series=f"seed {seed}",
                    x=cohort,
                    arguments=f"seed={seed},cohort={cohort}",
                )
            )
        rows.append(
            Row(
                f"seed {seed}, central",
                {},
                {"test": figures[-1]},
                start=start,
                arguments=f"seed={seed},training=central",
            )
        )
    # Larger cohorts are studied up to 5120 users.
    rows += [
        Row(
            f"seed {seed}, cohort {cohort}",
            {},
            start=_CV_STARTS[seed].name,
            series=f"seed {seed}",
            x=cohort,
            arguments=f"seed={seed},cohort={cohort}",
        )
        for seed, cohorts in (("ls100", (512, 1024, 2048, 5120)), ("cv05", (8, 64, 256)))
        for cohort in cohorts
    ]
    return Table(
        name="published_common_voice",
        title=f"Federated Common Voice English by seed and cohort, no privacy {_TITLE}",
        config=_CV,
        rows=tuple(rows),
        starts=tuple(_CV_STARTS.values()),
        expected="a larger cohort is better, a seed is better",
        x_label="users a round",
        log_x=True,
    )


def _languages() -> list[Table]:
    tables = []
    for language in ("fr", "de"):
        start = Row(
            f"CV-{language}-10 seed",
            {},
            arguments=f"language={language},training=central,split=cv10",
        )
        rows = [
            Row(
                f"seed {seed}, cohort {cohort}",
                {},
                start=start.name if seed == "cv10" else "",
                series=f"seed {seed}",
                x=cohort,
                arguments=f"language={language},seed={seed},cohort={cohort}",
            )
            for seed in ("none", "cv10")
            for cohort in (8, 16, 32, 64, 128, 256)
        ]
        rows += [
            Row(
                f"seed {seed}, central",
                {},
                start=start.name if seed == "cv10" else "",
                arguments=f"language={language},seed={seed},training=central",
            )
            for seed in ("none", "cv10")
        ]
        tables.append(
            Table(
                name=f"published_common_voice_{language}",
                title=f"Federated Common Voice {language} by seed and cohort {_TITLE}",
                config=_CV,
                rows=tuple(rows),
                starts=(start,),
                expected="as for English",
                x_label="users a round",
                log_x=True,
            )
        )
    return tables


_OPTIMIZER_RATES = {"server.learning_rate": (0.0006, 0.006, 0.06, 0.6)}


def _optimizers() -> list[Table]:
    librispeech = {"lamb": 6.6, "lars": 13.7, "adam": 14.1}
    voices = {"lamb": 62.9, "lars": 70.4, "adam": 68.9, "adagrad": 84.3, "sgd": 83.8}
    return [
        Table(
            name="published_optimizers_librispeech",
            title=f"Server optimisers, LibriSpeech from scratch, 8 users a round {_TITLE}",
            config=_LS,
            rows=tuple(
                Row(name, {}, {"dev_clean": figure}, arguments=f"cohort=8,optimizer={name}")
                for name, figure in librispeech.items()
            ),
            grid=_OPTIMIZER_RATES,
            select="dev_clean",
            report=("dev_clean", "test_clean"),
            expected="LAMB < LARS < Adam",
            better=(("lamb", "lars"), ("lars", "adam")),
        ),
        Table(
            name="published_optimizers_common_voice",
            title=f"Server optimisers, Common Voice from scratch, 8 users a round {_TITLE}",
            config=_CV,
            rows=tuple(
                Row(name, {}, {"dev": figure}, arguments=f"cohort=8,optimizer={name}")
                for name, figure in voices.items()
            ),
            grid=_OPTIMIZER_RATES,
            report=("test", "dev"),
            expected="LAMB < Adam < LARS < SGD < AdaGrad",
            better=(("lamb", "adam"), ("adam", "lars"), ("lars", "sgd"), ("sgd", "adagrad")),
        ),
    ]


def _variations() -> Table:
    rows = (
        Row("users", {}, {"test_other": 17.5}, arguments="cohort=8"),
        Row("IID", {}, {"test_other": 14.0}, arguments="cohort=8,iid=true"),
        Row("without SpecAugment", {}, arguments="cohort=8,specaugment=false"),
        Row("4000 rounds", {}, arguments="cohort=8,rounds=4000"),
        *(
            Row(f"FedProx {mu:g}", {}, arguments=f"cohort=8,fedprox={mu:g}")
            for mu in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
        ),
    )
    return Table(
        name="published_variations",
        title=f"LibriSpeech from scratch, 8 users a round: IID, length, FedProx {_TITLE}",
        config=_LS,
        rows=rows,
        select="dev_clean",
        report=("test_clean", "test_other"),
        expected="IID is better than users; SpecAugment helps; FedProx gains little",
        better=(("IID", "users"), ("users", "without SpecAugment")),
    )


def _privacy() -> Table:
    # dev, test by sigma in 1e-6 and clipping.
    figures = {
        50: {"uniform": (27.1, 31.3), "dim": (26.4, 30.6)},
        30: {"uniform": (25.2, 29.3), "dim": (24.2, 28.2)},
        10: {"global": (30.7, 35.2), "uniform": (21.3, 25.0), "dim": (20.1, 23.7)},
        3: {"global": (27.0, 31.1), "uniform": (17.9, 21.2), "dim": (17.1, 20.4)},
        1: {"global": (22.9, 26.7), "uniform": (16.2, 19.5), "dim": (16.0, 19.3)},
        0: {"global": (15.7, 18.9), "uniform": (15.9, 19.1)},
    }
    start = _CV_STARTS["ls100"]
    rows = [
        Row(
            f"{clipping}, sigma {sigma}e-6",
            {},
            {"dev": dev, "test": test},
            start=start.name,
            series=clipping,
            x=sigma * 1e-6 if sigma else None,
            arguments=f"seed=ls100,cohort=1024,clipping={clipping},sigma={sigma}e-6",
        )
        for sigma, cells in figures.items()
        for clipping, (dev, test) in cells.items()
    ]
    pairs = [
        (f"uniform, sigma {sigma}e-6", f"global, sigma {sigma}e-6") for sigma in (10, 3, 1)
    ] + [(f"dim, sigma {sigma}e-6", f"uniform, sigma {sigma}e-6") for sigma in (50, 30, 10, 3, 1)]
    return Table(
        name="published_privacy",
        title=f"Private Common Voice English, 1,024 users a round {_TITLE}",
        config=_CV,
        rows=tuple(rows),
        starts=(start,),
        expected="dim < uniform < global at every noise level",
        better=tuple(pairs),
        x_label="sigma",
        log_x=True,
    )


def _sizes() -> Table:
    start = _CV_STARTS["ls100"]
    models = ("base", "narrow", "wide", "shallow", "deep")
    # Every size needs a seed model of its own size.
    starts = tuple(
        Row(
            f"{start.name}, {model}",
            start.overrides,
            arguments=f"{start.arguments},model={model}",
        )
        for model in models
    )
    rows = tuple(
        Row(
            f"{model}, {label}",
            {},
            start=f"{start.name}, {model}",
            arguments=f"seed=ls100,cohort=1024,model={model}{privacy}",
        )
        for model in models
        for label, privacy in (("no privacy", ""), ("dim, 3e-6", ",clipping=dim,sigma=3e-6"))
    )
    return Table(
        name="published_sizes",
        title=f"Model sizes, Common Voice English, 1,024 users a round {_TITLE}",
        config=_CV,
        rows=rows,
        starts=starts,
    )


TABLES = {
    table.name: table
    for table in (
        _librispeech(),
        _common_voice(),
        *_languages(),
        *_optimizers(),
        _variations(),
        _privacy(),
        _sizes(),
    )
}
