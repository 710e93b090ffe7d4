"""DeepSpeed engines against plain torch: one optimizer batch is one gradient, however it is cut up and shared."""

import json
from pathlib import Path

import pytest

from tests.integration.programs import engine_steps
from tests.ranks import PROGRAMS, finish, start_ranks

pytestmark = pytest.mark.usefixtures("one_rank")


def run_steps(out: Path, processes: int, stage: int, tokens: int, extra: list[str] | None = None) -> dict:
    """Three optimizer steps of batches of 8 -> their losses, norms and weight digest; one rank needs no own process."""
    arguments = [str(out), str(stage), str(tokens), *(extra or [])]
    if processes == 1:
        engine_steps.main(arguments)
    else:
        finish(start_ranks(f"{PROGRAMS}.engine_steps", arguments, processes))
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The same three steps by plain torch and transformers' logits, sample by sample, no DeepSpeed."""
    return run_steps(tmp_path_factory.mktemp("plain"), 1, -1, 0)


SLOW = pytest.mark.slow  # each case starts DeepSpeed in one to six processes


@pytest.mark.parametrize(
    ("processes", "stage", "tokens"),
    [
        (1, 0, 100),
        pytest.param(1, 0, 1, marks=SLOW),
        pytest.param(1, 2, 20, marks=SLOW),
        pytest.param(2, 2, 1, marks=SLOW),
        (2, 3, 20),
    ],
    ids=str,
)
def test_every_cut_of_the_batch_gives_the_losses_of_plain_torch(tmp_path, plain, processes, stage, tokens):
    """Rows of 100 tokens hold the batch of 8 samples, rows of 1 a sample each: 8 micro-batches, or 2 x 4."""
    result = run_steps(tmp_path, processes, stage, tokens)
    assert result["losses"] == pytest.approx(plain["losses"], abs=2e-5)
    assert result["norms"] == pytest.approx(plain["norms"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("extra", [[], ["--checkpointing"]], ids=["", "recomputed"])
def test_layers_compiled_under_zero_3_give_the_losses_of_plain_torch(tmp_path, plain, extra):
    result = run_steps(tmp_path, 2, 3, 20, ["--compiled", *extra])
    assert result["losses"] == pytest.approx(plain["losses"], abs=2e-5)
    assert result["norms"] == pytest.approx(plain["norms"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_adapters_of_layers_compiled_under_zero_3_learn_as_those_of_eager_ones(tmp_path):
    """The first layer's input needs no gradient there: its adapters' gradients are made all the same, and reduced."""
    results = []
    for extra in ([], ["--compiled"]):
        out = tmp_path / "-".join(["run", *extra])
        out.mkdir()
        results.append(run_steps(out, 2, 3, 20, ["--lora", *extra]))
    eager, compiled = results
    assert compiled["losses"] == pytest.approx(eager["losses"], abs=2e-5)
    assert compiled["norms"] == pytest.approx(eager["norms"], rel=1e-3)
    assert compiled["merged_gap"] < 1e-5


@pytest.mark.parametrize(
    ("processes", "stage"), [(1, 0), pytest.param(2, 2, marks=SLOW), pytest.param(2, 3, marks=SLOW)], ids=str
)
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(tmp_path, processes, stage):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    undisturbed = run_steps(whole, processes, stage, 20)
    run_steps(parts, processes, stage, 20, ["--until", "2"])
    resumed = run_steps(parts, processes, stage, 20)
    assert resumed["first_step"] == 2
    assert resumed["weights"] == undisturbed["weights"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("processes", "stage"), [(1, 0), (2, 2), (2, 3)], ids=str)
def test_adapters_resume_bit_for_bit_on_an_untouched_base_and_are_merged(tmp_path, processes, stage):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    undisturbed = run_steps(whole, processes, stage, 20, ["--lora"])
    run_steps(parts, processes, stage, 20, ["--lora", "--until", "2"])
    resumed = run_steps(parts, processes, stage, 20, ["--lora"])
    assert resumed["first_step"] == 2
    assert resumed["weights"] == undisturbed["weights"]
    assert undisturbed["base_gap"] == 0
    assert undisturbed["adapted_gap"] > 0.01
    assert undisturbed["merged_gap"] < 1e-5


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)])
def test_an_fp16_overflow_of_one_engine_skips_the_step_of_both(stage):
    printed = finish(start_ranks(f"{PROGRAMS}.fp16_steps", [stage], 1)).splitlines()
    first, second, third = (json.loads(line) for line in printed if line.startswith("{"))
    norm = 20**0.5  # of four rows of ones and four biases of one
    for step in (first, third):
        assert step["skipped"] == [False, False]
        assert step["changed"] == [True, True]
        assert step["norms"] == pytest.approx([norm, norm], rel=1e-3)
    assert first["scales"] == [256, 256]
    assert second["skipped"] == [True, True]
    assert second["changed"] == [False, False]
    assert second["scales"] == third["scales"] == [256, 128]  # only the scale of the one that overflowed is lowered
