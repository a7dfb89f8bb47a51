"""`fedasr decode`: a split whose texts are withheld becomes a submission."""

import json

import numpy as np
import pytest

from fedasr.data import neural
from fedasr.data.neural import synthetic
from fedasr.recipes.neural import get_config
from fedasr.training import loop


@pytest.mark.long
def test_withheld_sentences_become_lines_in_their_order(program, tmp_path):
    io = pytest.importorskip("scipy.io", reason="scipy is not installed")
    sizes = {"days": 2, "train_sentences": 3, "test_sentences": 2, "holdout_sentences": 3}
    raw = synthetic.generate(
        synthetic.NeuralConfig(**sizes, words=(3, 3), electrodes=3, informative=3),
        tmp_path / "raw",
    )
    for file in (raw / "competitionHoldOut").glob("*.mat"):
        content = {k: v for k, v in io.loadmat(file).items() if not k.startswith("_")}
        content["sentenceText"] = np.array([" "] * 3)
        io.savemat(file, content)
    areas = neural.parse_areas("tx1[0:3],spikePow[0:3]")
    data = tmp_path / "data"
    neural.prepare_sessions(neural.NeuralSessions(raw, areas), data, stride=4)
    config = get_config("training=central")
    config.data.dir = str(data)
    config.model.options.update(features=6, units=4, layers=1, window=2, stride=2, subsample=2)
    config.central.steps, config.central.batch_size, config.devices = 2, 2, 1
    config.selection.split = ""
    loop.run(config.to_dict(), tmp_path / "run")
    command = ["fedasr.cli.decode", f"--checkpoint={tmp_path / 'run'}", f"--data={data}"]
    out = tmp_path / "submission.txt"
    done = program(*command, f"--out={out}", "--blank_penalty=9", "--beam=4", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["sentences"] == 6 and told["users"] == 2 and "wer" not in told
    lines = out.read_text().splitlines()
    assert len(lines) == 6 and any(lines)
    # Each day by itself gives the same, in the order of the file.
    other = tmp_path / "test.txt"
    known = program(*command, f"--out={other}", "--split=test", "--beam=4", "--json")
    assert json.loads(known.stdout.splitlines()[-1])["wer"] >= 0
    wrong = program(*command, f"--out={out}", "--pronunciations=/nowhere")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") <= 2
