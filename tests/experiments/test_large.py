import pytest

from experiments.benchmarks import large
from fedasr.recipes import shared


def test_flops_are_six_for_each_parameter_and_frame_plus_attention():
    options = shared.MODELS["base"]
    # Biases, norms and the front end's overlap aside, a dense layer costs 6 FLOPs a weight.
    short = large.step_flops(options, frames=3, utterances=1)
    assert short == pytest.approx(6 * shared.parameter_count("base"), rel=1e-3)
    frames, out = 1500, 500
    attention = 36 * 2 * out * 768 * 6 * out
    assert large.step_flops(options, frames, 8) == pytest.approx(
        8 * (out * short + attention), rel=1e-3
    )


def test_peaks_are_looked_up_by_the_longest_name():
    assert large.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert large.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert large.peak_flops("cpu") is None
