"""What a model and its ancestors were trained on, kept in the model's own folder.

The file goes where the model goes: into the registry, to another machine, into a warm start.  It holds the keys of the
groups (`data_prep.ledger.key_of`), sorted, 8 bytes each.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data_prep.splits import EVAL_KEYS
from data_prep.tables import iter_rows

FILE = "trained_on.npy"


def trained_on(folders: Iterable[Path]) -> np.ndarray:
    """The keys that the models in these folders were trained on, as far as they keep any. [keys] uint64, sorted."""
    files = [folder / FILE for folder in folders if (folder / FILE).is_file()]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *(np.load(file, allow_pickle=False) for file in files)]))


def keep(folder: Path, ancestors: Iterable[Path], own: np.ndarray) -> None:
    """Write into a model's folder what it was trained on itself, and what its ancestors were."""
    np.save(folder / FILE, np.union1d(trained_on(ancestors), own))


def unseen(groups: Sequence[str], models: Iterable[Path], split: Path) -> list[int]:
    """The places of the held-out groups that no model in these folders, or one that it comes from, was trained on.

    split: the folder of the split that holds the groups out.  ValueError if there is none.
    """
    trained = set(trained_on(models).tolist())
    seen = {row["group"] for row in iter_rows(split / EVAL_KEYS) if not trained.isdisjoint(row["keys"])}
    left = [place for place, group in enumerate(groups) if group not in seen]
    if not left:
        raise ValueError(
            "The models of this step, or those that they come from, were trained on every held-out prompt: "
            "add rows that are new to them, or keep the split ledger of their workspace."
        )
    return left
