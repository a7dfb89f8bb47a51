"""Checkpoints of others by one command: better than both parents, loadable, not lost to kill -9."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="checkpoints of others need safetensors")

import jax  # noqa: F401  # numpy knows bfloat16 by it
from safetensors.numpy import load_file, save_file

MODELS = Path(__file__).with_name("tiny_models.py")
_spec = importlib.util.spec_from_file_location("tiny_models", MODELS)
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

FUSE = ("experiments.fuse", "--task=checkpoints", "--json", "--population=6")
SHORT = ("--evaluations=60", "--every=20", "--chromosomes=embed")


def figures(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def write_llama(folder, model):
    """Three files with an index, a configuration and a tokenizer's file."""
    folder.mkdir()
    files = {
        name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(sorted(model))
    }
    for file in set(files.values()):
        held = {name: value for name, value in model.items() if files[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    size = sum(value.nbytes for value in model.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG))
    (folder / "tokenizer.json").write_text("{}")


def load(folder):
    return {
        n: x for file in sorted(folder.glob("*.safetensors")) for n, x in load_file(file).items()
    }


@pytest.fixture(scope="session")
def llamas(once):
    def make(folder):
        pair = tiny.students(tiny.llama_teacher(), "model.embed_tokens.weight")
        for name, model in zip("AB", pair, strict=True):
            write_llama(folder / name, model)

    folder = once("llamas", make)
    return folder / "A", folder / "B"


@pytest.fixture(scope="session")
def merged_llama(llamas, once, program):
    """An uninterrupted merge: (work directory, summary)."""

    def make(folder):
        flags = (f"--models={llamas[0]},{llamas[1]}", f"--score={MODELS}:llama_score")
        done = program(*FUSE, *SHORT, *flags, f"--workdir={folder}/run")
        (folder / "summary").write_text(json.dumps(figures(done)))

    folder = once("merged_llama", make)
    return folder / "run", json.loads((folder / "summary").read_text())


def test_llamas_merge_to_a_score_that_neither_parent_has(llamas, merged_llama):
    workdir, summary = merged_llama
    parents = [float(tiny.llama_score(load(folder)).mean()) for folder in llamas]
    assert summary["parents_score"] == pytest.approx(parents) and max(parents) < 0.6
    assert summary["score"]["mean"] > max(*parents, summary["average_score"]) + 0.2
    assert summary["curve"]["evaluations"] == [0, 20, 40, 60] and summary["seeds"] == 1
    fused = workdir / "fused" / "m2n2"
    assert summary["fused"] == str(fused)
    merged, first = load(fused), load(llamas[0])
    assert float(tiny.llama_score(merged).mean()) == pytest.approx(summary["score"]["mean"])
    assert {n: (x.dtype, x.shape) for n, x in merged.items()} == {
        n: (x.dtype, x.shape) for n, x in first.items()
    }
    written = {x.name for x in fused.iterdir()}
    assert written == {x.name for x in llamas[0].iterdir()} | {"merged.json"}
    said = json.loads((fused / "merged.json").read_text())
    assert said["method"] == "m2n2" and said["score"] == summary["score"]["mean"]


def test_transformers_loads_the_merged_llama(merged_llama):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    fused = merged_llama[0] / "fused" / "m2n2"
    model, said = transformers.LlamaForCausalLM.from_pretrained(
        fused, dtype=torch.float32, output_loading_info=True
    )
    assert not any(said.values())
    with torch.no_grad():
        logits = model(torch.arange(tiny.VOCAB)[:, None]).logits[:, 0].numpy()
    np.testing.assert_allclose(logits, tiny.llama_logits(load(fused)), atol=1e-3)


@pytest.mark.long
def test_killed_it_ends_as_the_uninterrupted_one(
    program, program_environment, llamas, merged_llama, tmp_path
):
    whole, summary = merged_llama
    flags = (*SHORT, f"--models={llamas[0]},{llamas[1]}", f"--score={MODELS}:llama_score")
    flags = (*FUSE[1:], *flags, f"--workdir={tmp_path}/run")
    command = [sys.executable, "-m", FUSE[0], *flags, "--save_seconds=0"]
    process = subprocess.Popen(
        command, env=program_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    folder = tmp_path / "run" / "search" / "m2n2" / "seed_0" / "checkpoints"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if folder.exists() and any(x.name.isdecimal() for x in folder.iterdir()):
            break
        time.sleep(0.01)
    process.kill()
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    done = program(FUSE[0], *flags)
    assert "going on from" in done.stderr
    resumed = figures(done)
    for key in ("score", "curve", "parents_score"):
        assert resumed[key] == summary[key]
    ours, theirs = (load(x / "fused" / "m2n2") for x in (tmp_path / "run", whole))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


def test_unets_merge_by_a_score_of_every_kind(program, tmp_path):
    pair = tiny.students(tiny.unet_teacher(), "class_embedding.weight")
    names = []
    for name, model in zip("AB", pair, strict=True):
        names.append(str(tmp_path / f"{name}.safetensors"))
        save_file(model, names[-1])
    plot = tmp_path / "curves.png"
    methods = "m2n2,map_elites,average"
    done = program(
        *(*FUSE, *SHORT, f"--models={','.join(names)}", f"--score={MODELS}:unet_score"),
        *(f"--method={methods}", f"--plot={plot}", "--archive=device", f"--workdir={tmp_path}/run"),
    )
    found = figures(done)["methods"]
    best = max(found["m2n2"]["parents_score"])
    assert found["m2n2"]["score"]["mean"] > best + 0.1
    assert found["map_elites"]["score"]["mean"] > best
    average = found["average"]
    assert average["score"]["mean"] == pytest.approx(average["average_score"], abs=2e-3)
    assert plot.read_bytes().startswith(b"\x89PNG")
    for name in methods.split(","):
        (file,) = (tmp_path / "run" / "fused" / name).glob("*.safetensors")
        score = tiny.unet_score(load_file(file)).mean()
        assert file.name == "A.safetensors"
        assert score == pytest.approx(found[name]["score"]["mean"], abs=1e-5)


def test_a_score_of_folders_and_task_arithmetic(program, llamas, tmp_path):
    """The base is a parent here: the best factor moves away from it to the other."""
    flags = (f"--models={llamas[0]},{llamas[1]}", f"--score={MODELS}:llama_folder_score")
    found = figures(
        program(
            *(*FUSE, *flags, "--score_takes=folder", "--method=task_arithmetic"),
            *(f"--base={llamas[0]}", "--evaluations=4", "--seeds=2", f"--workdir={tmp_path}/run"),
        )
    )
    assert found["parents_score"] == [
        pytest.approx(float(tiny.llama_score(load(folder)).mean())) for folder in llamas
    ]
    assert len(found["score"]["per_seed"]) == 2
    fused = load(tmp_path / "run" / "fused" / "task_arithmetic")
    assert float(tiny.llama_score(fused).mean()) == pytest.approx(max(found["score"]["per_seed"]))


def test_mistakes_are_one_line(program, llamas, tmp_path):
    a, b = llamas
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def negative(model):\n    return np.float32([-1.5, 0.2])\n"
        "def one(model):\n    return 0.5\n"
    )
    lacking = tmp_path / "B.safetensors"
    model = load(b)
    del model["model.norm.weight"]
    save_file(model, lacking)
    both = f"--models={a},{b}"
    for flags, message in {
        (): "--models and --score",
        (both, f"--score={tmp_path}/mine.py:negative"): "score of -1.5",
        (both, f"--score={tmp_path}/mine.py:one"): "one number for each data point",
        (both, f"--score={tmp_path}/mine.py:two"): "no function two",
        (f"--models={a},{lacking}", f"--score={MODELS}:llama_score"): "lacks the tensor model.norm",
        (f"--models={a}", f"--score={MODELS}:llama_score"): "two models",
    }.items():
        done = program(*FUSE, *flags)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
