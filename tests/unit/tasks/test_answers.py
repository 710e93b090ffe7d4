"""PPO's answers as a table while it runs."""

import json
from pathlib import Path

from tasks import steps, tracking
from tasks.answers import SHOWN, Answers
from tasks.base import train_tokenizer
from tasks.config import RunConfig
from tasks.training import samples


def test_the_table_grows_with_the_pools_and_is_kept_in_mlflow_and_prefect(tmp_path: Path, monkeypatch) -> None:
    tokenizer = train_tokenizer(iter(["the apple is red", "a pear is green"]), 300)
    tokenizer.save_pretrained(tmp_path / "model")
    answers, file = Answers(tmp_path, tmp_path / "model"), tmp_path / samples.SAMPLES
    assert answers.fresh() == []

    def pool(step: int) -> None:
        with file.open("a") as out:
            for number in range(SHOWN + 2):
                ids = {"prompt": tokenizer.encode("the apple"), "answer": tokenizer.encode(f"is red {number}")}
                out.write(json.dumps({"step": step, **ids, "reward": 0.5, "kl": 1.25}) + "\n")

    pool(1)
    first = answers.fresh()
    assert first[0] == {"pool": 1, "prompt": "the apple", "answer": "is red 0", "reward": 0.5, "kl": 1.25}
    assert (len(first), answers.fresh()) == (SHOWN, [])
    pool(11)
    with file.open("a") as out:
        out.write('{"step": 11, "pro')
    rows = answers.fresh()
    assert [row["pool"] for row in rows] == [1] * SHOWN + [11] * SHOWN

    store = tracking.open_store(tmp_path)
    run = tracking.start_run(store, RunConfig(), {})
    for table in (first, rows):
        tracking.log_table(store, run, table, "answers.json")
    from mlflow import MlflowClient  # load_table looks for runs in the store of the environment

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)

    read = MlflowClient(store.uri).load_table(store.experiment_id, "answers.json", [run])
    assert read["answer"].tolist() == [row["answer"] for row in rows]

    made = []
    monkeypatch.setattr(steps, "create_table_artifact", lambda table, **options: made.append((table, options["key"])))
    steps.answer_table(rows)
    assert made == [(rows[SHOWN:], "ppo-answers")]
