"""The suite is tested: with each fault planted, the tests that must notice turn red.

One command prints the faults, and which test catches each:

    pytest -m planted -n 0
    pytest -m "planted and not slow" -n 0   # without those that whole runs have to notice
"""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path

import hypothesis
import pytest

# The same examples every time, however slow the machine is; the first that fails will do.
hypothesis.settings.register_profile(
    "planted",
    derandomize=True,
    deadline=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
ROOT = Path(__file__).parents[2]


def _beside(name):
    spec = importlib.util.spec_from_file_location(
        f"_{name}", Path(__file__).with_name(f"{name}.py")
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


planting = sys.modules.get("_planting") or _beside("planting")
table = sys.modules.get("_planted_faults") or _beside("planted_faults")


def asserted(error):
    """Whether it was a test that said no: not, say, a fault that cannot even be run."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(asserted, error.exceptions))
    return isinstance(error, AssertionError | pytest.fail.Exception)


class Verdicts:
    """Of a nested run: {node: (outcome, whether an assertion failed, what it said)}."""

    def __init__(self):
        self.found = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.excinfo is not None and not report.passed:
            name = item.nodeid
            self.found[name] = report.outcome, asserted(call.excinfo.value), report.longreprtext
        elif report.when == "call":
            self.found.setdefault(item.nodeid, (report.outcome, False, ""))
        return report


def outcomes(nodes):
    """Runs tests within this process, with modules of their own that remember nothing."""
    before = {name: m for name, m in sys.modules.items() if _is_test(m)}
    for name in before:
        del sys.modules[name]
    verdicts = Verdicts()
    args = ["-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:xdist", "-p", "no:logging"]
    args += ["-o", "addopts=--import-mode=importlib", "--rootdir", str(ROOT)]
    args += [f"{ROOT / node.partition('::')[0]}::{node.partition('::')[2]}" for node in nodes]
    said, profile = io.StringIO(), hypothesis.settings.get_current_profile_name()
    hypothesis.settings.load_profile("planted")
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pytest.main(args, plugins=[verdicts])
    finally:
        hypothesis.settings.load_profile(profile)
        for name in [name for name, m in sys.modules.items() if _is_test(m)]:
            del sys.modules[name]
        sys.modules.update(before)
    if not verdicts.found:
        raise LookupError(f"no test was run of {nodes} (status {code}): {said.getvalue()[-2000:]}")
    return verdicts.found


def _is_test(module):
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).name.startswith("test_") and ROOT in Path(file).parents


def parameters():
    """The faults, those that whole runs have to notice marked slow."""
    for fault in table.FAULTS:
        slow = pytest.mark.slow if set(fault.caught_by) & table.SLOW else ()
        yield pytest.param(fault, id=fault.name, marks=slow)


@pytest.mark.planted
@pytest.mark.parametrize("fault", list(parameters()))
def test_a_planted_fault_turns_the_suite_red(fault, record_property):
    record_property("planted", (fault.area, fault.name, fault.breaks, fault.caught_by))
    for node in fault.caught_by:
        with planting.planted(*fault.changes):
            found = outcomes([node])
        red = [name for name, (_, asserted, _) in found.items() if asserted]
        assert red, (
            f"{fault.name} ({fault.breaks}): {node} did not notice: "
            f"{ {name: (outcome, text[-1500:]) for name, (outcome, _, text) in found.items()} }"
        )


@pytest.mark.planted
@pytest.mark.slow
def test_the_catching_tests_are_green_without_a_fault():
    """Otherwise they would catch everything."""
    planting.forget()
    found = outcomes(sorted({node for fault in table.FAULTS for node in fault.caught_by}))
    assert {name: text for name, (outcome, _, text) in found.items() if outcome != "passed"} == {}


def test_a_fault_needs_its_target():
    function = "fedasr.privacy.mechanism:_joint"
    for broken in (
        planting.Edit("fedasr.privacy.mechanism:no_such_function", "a", "b"),
        planting.Edit(function, "no such code", "b"),
        planting.Edit(function, "z", "x", count=1),
        planting.Value("fedasr.privacy.noise:_NO_SUCH_NUMBER", 1),
        planting.Value("fedasr.privacy.noise:_MARGIN", 16.0),
    ):
        with pytest.raises(LookupError), planting.planted(broken):
            pass


def test_a_fault_is_gone_afterwards():
    from fedasr.privacy import mechanism, noise

    before = mechanism._joint.__code__, noise._MARGIN
    with planting.planted(
        planting.Edit("fedasr.privacy.mechanism:_joint", "return least /", "return 2 * least /"),
        planting.Value("fedasr.privacy.noise:_MARGIN", 3.0),
    ):
        assert mechanism._joint(1.0) == 2.0 and noise.reach_for(0.0) == 3.0
    assert (mechanism._joint.__code__, noise._MARGIN) == before and mechanism._joint(1.0) == 1.0


def test_every_fault_follows_the_code_that_it_is_about():
    """It is planted and taken back, without a run."""
    for fault in table.FAULTS:
        with contextlib.ExitStack() as stack:
            for change in fault.changes:
                stack.enter_context(change.planted())


def test_every_area_has_faults_and_no_two_are_alike():
    assert len(table.FAULTS) >= 24
    assert len({fault.name for fault in table.FAULTS}) == len(table.FAULTS)
    assert len({fault.changes for fault in table.FAULTS}) == len(table.FAULTS)
    assert {fault.area for fault in table.FAULTS} == set(table.AREAS)
