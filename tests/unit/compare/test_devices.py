"""Which device each run of a study sees, without any: PyTorch is told how many there are."""

import pytest

from heterodox.app.folder import RunFolder
from heterodox.study.jobs import Job
from heterodox.study.study import Study
from tests.tiny import tiny_recipe


@pytest.fixture
def two(monkeypatch):
    """Two devices."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def study(tmp_path, *devices: str, jobs: int | None = None) -> Study:
    recipes = [tiny_recipe(name=f"{number}", run={"device": device}) for number, device in enumerate(devices)]
    return Study(recipes, tmp_path, num_seeds=1, jobs=jobs)


@pytest.mark.parametrize(
    ("visible", "slots"),
    [(None, ["0", "1"]), ("2,3", ["2", "3"]), ("GPU-ab12, MIG-cd34", ["GPU-ab12", "MIG-cd34"]), ("5,1,9", ["5", "1"])],
)
def test_slots_are_the_devices_that_this_process_sees(visible, slots, two, tmp_path, monkeypatch):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert study(tmp_path, "cuda").slots == slots
    assert study(tmp_path, "auto", jobs=3).slots == [*slots, slots[0]]
    assert study(tmp_path, "cuda:1").slots == [slots[1]]


def test_a_process_is_told_its_slot(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("subprocess.Popen", lambda *_, env, **__: told.append(env["CUDA_VISIBLE_DEVICES"]))
    Job(tiny_recipe(), RunFolder(tmp_path / "run")).start("GPU-ab12")
    assert told == ["GPU-ab12"]


@pytest.mark.parametrize(
    ("devices", "slots", "runs"),
    [
        (["cuda:1"], ["1"], ["cuda"]),
        (["cuda:0"], ["0"], ["cuda:0"]),
        (["cuda:1", "cuda:0"], ["0", "1"], ["cuda", "cuda:0"]),
        (["cuda:1", "cuda"], ["0", "1"], ["cuda", "cuda"]),
        (["cpu", "cuda:1"], ["1"], ["cpu", "cuda"]),
        (["cpu", "auto"], ["0", "1"], ["cpu", "auto"]),
    ],
)
def test_every_recipe_is_asked_and_a_run_takes_the_one_device_that_it_sees(devices, slots, runs, two, tmp_path):
    found = study(tmp_path, *devices)
    assert found.slots == slots
    assert [job.recipe.run.device for job in found.jobs] == runs


def test_on_a_cpu_there_are_as_many_slots_as_jobs(two, tmp_path):
    assert study(tmp_path, "cpu", "cpu", jobs=2).slots == [None, None]
