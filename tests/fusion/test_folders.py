"""Folders of safetensors: what is read is written back, and what does not fit is named."""

import json

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="checkpoints of others need safetensors")
import ml_dtypes
from safetensors.numpy import load_file, save_file

from fedasr.errors import UserError
from fedasr.fusion import checkpoints, folders

BF16 = ml_dtypes.bfloat16


def tensors(seed=0, **changes):
    rng = np.random.default_rng(seed)
    made = {
        "layers.10.weight": rng.standard_normal((3, 2)).astype(BF16),
        "layers.2.weight": rng.standard_normal((2, 2)).astype(np.float16),
        "norm": rng.standard_normal(2).astype(np.float32),
        "scale": np.array(rng.standard_normal(), np.float64),
        "steps": np.array(seed, np.int64),
        "positions": np.arange(4),
    }
    return {name: value for name, value in (made | changes).items() if value is not None}


def sharded(folder, values, metadata=True):
    """Two files, an index, and what lies beside weights."""
    folder.mkdir(parents=True)
    names = sorted(values)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        held = {name: values[name] for name in names if files[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"} if metadata else None)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    (folder / "README.md").write_text("the best model")
    return folder


def single(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(values, path)
    return path


def test_a_sharded_folder_is_written_back_as_it_was(tmp_path):
    values = tensors()
    folder = folders.open_folder(sharded(tmp_path / "a", values))
    model, _ = folders.read(folder)
    assert model.keys() == values.keys()
    for name, value in values.items():
        assert model[name].dtype == value.dtype and model[name].shape == value.shape
        np.testing.assert_array_equal(model[name], value)
        assert not model[name].flags.writeable
    out = folders.write(folder, model, tmp_path / "out", {"method": "m2n2"})
    beside = {"config.json", "tokenizer", "model.safetensors.index.json", "merged.json"}
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert {x.name for x in out.iterdir()} == beside | shards
    for name in ("config.json", "tokenizer/vocab.txt", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    for shard in shards:
        there, here = load_file(tmp_path / "a" / shard), load_file(out / shard)
        assert there.keys() == here.keys()
        for name, value in there.items():
            assert here[name].dtype == value.dtype and here[name].shape == value.shape
            np.testing.assert_array_equal(here[name], value)
    again = folders.open_folder(out)
    assert set(again.metadata.values().__iter__().__next__().items()) == {("format", "pt")}
    # What was merged may be replaced, anything else may not.
    folders.write(folder, model, out)
    with pytest.raises(UserError, match="not a merged model"):
        folders.write(folder, model, tmp_path / "a")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "out"]


def test_parts_of_a_pipeline_and_single_files(tmp_path):
    save = {"w": np.ones(2, np.float32)}
    single(tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors", save)
    single(tmp_path / "p" / "vae" / "diffusion_pytorch_model.safetensors", save)
    (tmp_path / "p" / "model_index.json").write_text("{}")
    folder = folders.open_folder(tmp_path / "p")
    assert set(folder.tensors) == {"unet/w", "vae/w"}
    out = folders.write(folder, {"unet/w": save["w"], "vae/w": 2 * save["w"]}, tmp_path / "o")
    found = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")["w"]
    np.testing.assert_array_equal(found, [2, 2])
    assert (out / "model_index.json").is_file()
    # A file among others is that file; alone beside a configuration it stands for its folder.
    lone = single(tmp_path / "x" / "A.safetensors", save)
    (lone.parent / "notes.txt").write_text("mine")
    assert not folders.open_folder(lone).whole
    written = folders.write(folders.open_folder(lone), save, tmp_path / "ox")
    assert {x.name for x in written.iterdir()} == {"A.safetensors", "merged.json"}
    (lone.parent / "config.json").write_text("{}")
    assert folders.open_folder(lone).whole
    single(tmp_path / "x" / "B.safetensors", save)
    assert not folders.open_folder(lone).whole


def test_types_follow_the_first_model(tmp_path):
    a = single(tmp_path / "a.safetensors", tensors(0))
    b = single(tmp_path / "b.safetensors", tensors(1, norm=np.ones(2, BF16)))
    said = []
    parents = checkpoints.load_parents([a, b], say=said.append)
    assert len(said) == 1 and "1 tensors are converted" in said[0]
    assert parents.models[1]["norm"].dtype == np.float32
    assert parents.models[0]["scale"].dtype == np.float32  # JAX's; it is written as it was
    assert set(parents.rest) == {"steps", "positions"} and parents.rest["steps"] == 0
    whole = parents.whole(parents.average())
    first = load_file(a)
    assert {n: x.dtype for n, x in whole.items()} == {n: x.dtype for n, x in first.items()}
    np.testing.assert_allclose(whole["norm"], (first["norm"] + 1) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": None}, "b.safetensors lacks the tensor norm"),
        ({"extra": np.ones(1, np.float32)}, "a.safetensors lacks the tensor extra"),
        ({"norm": np.ones(3, np.float32)}, r"tensor norm has shape \[3\].*\[2\]"),
        ({"positions": np.arange(4)[::-1].copy()}, "tensor positions.*differs"),
        ({"norm": np.ones(2, np.int32)}, "tensor norm is I32"),
        ({"norm": np.ones(2, ml_dtypes.float8_e4m3fn)}, "tensor norm is F8_E4M3"),
        ({"norm": np.float32([1, np.nan])}, "tensor norm has values that are not finite"),
    ],
)
def test_what_differs_is_named_in_one_line(tmp_path, changes, message):
    a = single(tmp_path / "a.safetensors", tensors(0))
    b = single(tmp_path / "b.safetensors", tensors(1, **changes))
    with pytest.raises(UserError, match=message) as caught:
        checkpoints.load_parents([a, b])
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_named(tmp_path):
    folder = sharded(tmp_path / "a", tensors())
    with pytest.raises(UserError, match="two models"):
        checkpoints.load_parents([folder])
    for name in ("nothing", "nothing.safetensors"):
        with pytest.raises(UserError, match="no folder and no file"):
            folders.open_folder(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no"):
        folders.open_folder(tmp_path / "empty")
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    held = load_file(shard)
    shard.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=r"00002-of-00002.*cannot be read"):
        folders.open_folder(folder)
    missing, *rest = sorted(held)
    save_file({name: held[name] for name in rest}, shard)
    with pytest.raises(UserError, match=f"lacks the tensor {missing}"):
        folders.open_folder(folder)
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        folders.open_folder(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as an index"):
        folders.open_folder(folder)
    single(tmp_path / "two" / "model.safetensors", tensors())
    single(tmp_path / "two" / "model.fp16.safetensors", tensors())
    with pytest.raises(UserError, match="is in both"):
        folders.open_folder(tmp_path / "two")


def test_scores_and_chromosomes_by_name(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import numpy as np\ndef f(x):\n    return [1]\nno = 3\n")
    assert checkpoints.load_score(f"{tmp_path}/mine.py:f")(None) == [1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    for text, message in {
        "mine": "write MODULE:FUNCTION",
        "mine:g": "no function g",
        "mine:no": "no function no",
        "yours_of_all:f": "cannot be imported",
        "yours.py:f": "no file yours.py",
    }.items():
        with pytest.raises(UserError, match=message):
            checkpoints.load_score(text)
    layers = checkpoints.by_pattern(r"layers\.\d+")
    assert layers("m.layers.1.w") == layers("m.layers.1.b") != layers("m.layers.10.w")
    assert layers("embed") == layers("norm") != layers("m.layers.1.w")
    attention = checkpoints.by_pattern("(attn|mlp)")
    assert attention("layers.1.attn.q") == attention("layers.2.attn.k")
    with pytest.raises(UserError, match="chromosomes"):
        checkpoints.by_pattern("(")
