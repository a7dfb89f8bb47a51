"""A trained recogniser as a folder for others, with a model card.

    fedasr export --model=DIR --out=FOLDER [--format=fedasr|huggingface|onnx] [--merge=False]

The model is a work directory of `fedasr train` or one checkpoint's folder. "fedasr" is the
project's own format: safetensors, config.json and a card, which do not say whom it was trained on;
`fedasr evaluate`, `transcribe` and --config.init_from take it in place of a checkpoint.
"huggingface" is a folder that `transformers` loads, of models that came from there. "onnx" is a
graph from log-mel features to scores, for onnxruntime. Factors of LoRA are merged into the base's
matrices unless --merge=False. The card says what the model was trained on, its error rates where
they are known, and what is promised to the users, and what is not. Exit status: 0 when done, 2 for
a mistake that the user can mend.
"""

from pathlib import Path

from absl import flags

from fedasr.cli import common
from fedasr.errors import UserError


def run() -> None:
    """Exports and prints what was written."""
    values = flags.FLAGS
    if not values.model or not values.out:
        raise UserError("--model and --out are needed: give both folders")
    from fedasr.training.exporting import export

    export(values.model, values.out, values.format, values.merge)
    files = sorted(path for path in Path(values.out).rglob("*") if path.is_file())
    common.show(
        {
            "out": values.out,
            "format": values.format,
            "files": {str(path.relative_to(values.out)): path.stat().st_size for path in files},
        }
    )


def _define_flags() -> None:
    flags.DEFINE_string("model", None, "A work directory or a checkpoint.")
    flags.DEFINE_string("out", None, "Folder to make.")
    flags.DEFINE_string("format", "fedasr", "fedasr, huggingface or onnx.")
    flags.DEFINE_bool("merge", True, "Make factors of LoRA part of the base's matrices.")


def main() -> None:
    """The command `fedasr export`: parses the flags, runs and exits."""
    _define_flags()
    common.main(run, __name__, urls=["model"])


if __name__ == "__main__":
    main()
