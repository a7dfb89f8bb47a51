"""Recipes: configurations by name, and tables of them.

`--config=rnnt:model=conformer` is the recipe `rnnt` with an argument. A recipe is a module of this
package with `get_config`; it starts from `fedasr.training.config.default_config` and, for the
published settings, from `shared`. `published` and `mini` define tables (see `tables`) for
`fedasr sweep`.
"""

from pathlib import Path

from fedasr.errors import UserError

NAMES = (
    "quickstart",
    "own_speech",
    "adapted",
    "rnnt",
    "librispeech",
    "common_voice",
    "large_asr",
    "phone",
    "neural",
    "mini",
    "mini_algorithms",
)


def locate(config: str) -> str:
    """The file of a --config, with the arguments that it has.

    Args:
      config: a recipe's name or the path of a file, either followed by ":ARGUMENTS" or not. A file
        that has the name of a recipe is ./NAME.

    Returns:
      The same with the path of the recipe's file for its name.

    Raises:
      UserError: a name that is neither a recipe's nor a file's.
    """
    name, colon, arguments = config.partition(":")
    if name in NAMES:
        name = str(Path(__file__).with_name(f"{name}.py"))
    elif name.isidentifier() and not Path(name).is_file():
        raise UserError(
            f"--config={name}: there is no such recipe: choose one of {', '.join(NAMES)}, or give "
            "the path of a file"
        )
    return f"{name}{colon}{arguments}"
