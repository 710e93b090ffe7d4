"""The sets that can be read: their true columns, splits and forms, and how a row becomes a raw pair.

Six sets of the Hugging Face hub; and local files and other sets in one of the forms of `data_prep.kinds`, which are
written in its unified columns.  What a row's text needs (parsing, repairs, checks) is `data_prep.clean`'s work; here is
only what differs from set to set.
"""

import difflib
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name

from data_prep.kinds import UNIFIED, Kind, check_columns, unified
from data_prep.local_files import read_local

Row = Mapping[str, Any]
HUB_TIMEOUT = 20.0
"""Seconds that the hub has to say which commit a branch points to."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class SourceSpec:
    """What the user says about one source.

    name: a hub id of `SOURCES`, or of any set whose kind is given, or any label for local files.  path: a local JSON,
    JSONL, CSV or Parquet file, or a folder with train.* and perhaps test.*.  kind: what its rows are; for local files
    it is told by the columns.  revision: of the hub's repository.  max_rows: most train rows kept, chosen by hash.
    max_pairs_per_prompt: most pairs of one group of the source, the first ones; None: as the source has it.
    min_score_ratio: SHP only.  ValueError for an unknown name or a value out of range.
    """

    name: str
    path: str | None = None
    revision: str | None = None
    max_rows: int | None = None
    min_score_ratio: float = 2.0
    max_pairs_per_prompt: int | None = None
    kind: Kind | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.name in SOURCES:
            raise ValueError(f"The rows of {self.name} are pairs: leave its kind out.")
        if self.is_known and self.name not in SOURCES:
            near = difflib.get_close_matches(self.name, SOURCES, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(SOURCES)}."
            raise ValueError(
                f"Unknown source {self.name!r}: {hint} (For a local file, give its path; for another set, its kind.)"
            )
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows of {self.name} is {self.max_rows}; it has to be at least 1 (or left out).")
        if self.max_pairs_per_prompt is not None and self.max_pairs_per_prompt < 1:
            raise ValueError(
                f"max_pairs_per_prompt of {self.name} is {self.max_pairs_per_prompt}; it has to be at least 1 "
                "(or left out)."
            )

    @property
    def is_known(self) -> bool:
        """Whether it is one of the six, in a form of its own."""
        return self.path is None and self.kind is None


class RawPair(NamedTuple):
    """A row as its set has it: texts or message lists, None where a cell is empty.

    An SFT-only row has its whole conversation as the prompt.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    weight: float = 1.0
    sft_only: bool = False


@dataclass(frozen=True)
class Source:
    """One set: where its rows are and how they read.

    columns: those read.  sides: our train and test -> the set's own splits.  form: "dialogue" prompts are
    Human/Assistant text, "question" prompts are one user's message, "either" is told apart row by row.  read: row ->
    raw pair, better answer first.  reject: row, spec -> why the row says nothing (a reason for the count), or None.
    group: row -> what keeps rows together beside an equal prompt.  pairs_per_group: most that are kept, where the spec
    names no number.  repairs: names of `data_prep.text.REPAIRS`.  revision: of the hub, where the rows are not on main.
    """

    columns: tuple[str, ...]
    sides: Mapping[str, tuple[str, ...]]
    form: Literal["dialogue", "question", "either"]
    read: Callable[[Row], RawPair]
    reject: Callable[[Row, SourceSpec], str | None] = lambda row, spec: None
    group: Callable[[Row], str | None] = lambda row: None
    pairs_per_group: int | None = None
    repairs: tuple[str, ...] = ()
    revision: str = "main"


def _plain(row: Row) -> RawPair:
    return RawPair(row["prompt"], row["chosen"], row["rejected"])


def _without_name(answer: Any) -> Any:
    return answer.removeprefix("Assistant:") if isinstance(answer, str) else answer


def _named_answers(row: Row) -> RawPair:
    """rlhf-reward-datasets: the prompt stops before "Assistant:", and each answer begins with it."""
    return RawPair(row["prompt"], _without_name(row["chosen"]), _without_name(row["rejected"]))


def _webgpt(row: Row) -> RawPair:
    first, second = row["answer_0"], row["answer_1"]
    better, worse = (first, second) if row["score_0"] > row["score_1"] else (second, first)
    return RawPair((row["question"] or {}).get("full_text"), better, worse)


def _webgpt_tie(row: Row, spec: SourceSpec) -> str | None:
    return "tie" if row["score_0"] == row["score_1"] else None


def _shp(row: Row) -> RawPair:
    """`labels` 1 means that A is preferred."""
    first, second = row["human_ref_A"], row["human_ref_B"]
    better, worse = (first, second) if row["labels"] == 1 else (second, first)
    return RawPair(row["history"], better, worse)


def _shp_unclear(row: Row, spec: SourceSpec) -> str | None:
    return "low_score_ratio" if row["score_ratio"] < spec.min_score_ratio else None


_PAIR_COLUMNS = ("prompt", "chosen", "rejected")
_TRAIN_AND_TEST = {"train": ("train",), "test": ("test",)}
_TRAIN_ONLY: dict[str, tuple[str, ...]] = {"train": ("train",), "test": ()}

SOURCES: dict[str, Source] = {
    "Dahoas/rm-static": Source(_PAIR_COLUMNS, _TRAIN_AND_TEST, "dialogue", _plain),
    "Dahoas/full-hh-rlhf": Source(_PAIR_COLUMNS, _TRAIN_AND_TEST, "dialogue", _plain),
    "Dahoas/synthetic-instruct-gptj-pairwise": Source(_PAIR_COLUMNS, _TRAIN_ONLY, "question", _plain),
    "yitingxie/rlhf-reward-datasets": Source(_PAIR_COLUMNS, _TRAIN_AND_TEST, "dialogue", _named_answers),
    # A loading script on main, which datasets >= 4 refuses; the hub's own conversion holds the same rows.
    "openai/webgpt_comparisons": Source(
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        _TRAIN_ONLY,
        "question",
        _webgpt,
        reject=_webgpt_tie,
        repairs=("html_entities", "citations"),
        revision="refs/convert/parquet",
    ),
    # JSON files by domain on main; the conversion has them as one table a split.
    "stanfordnlp/SHP": Source(
        ("post_id", "history", "human_ref_A", "human_ref_B", "labels", "score_ratio"),
        {"train": ("train", "validation"), "test": ("test",)},
        "question",
        _shp,
        reject=_shp_unclear,
        group=lambda row: row["post_id"],
        pairs_per_group=5,
        repairs=("html_entities",),
        revision="refs/convert/parquet",
    ),
}


def _unified(row: Row) -> RawPair:
    return RawPair(row["prompt"], row["chosen"], row["rejected"], row["weight"], row["kind"] == "sft")


OTHER = Source(UNIFIED, _TRAIN_AND_TEST, "either", _unified, reject=lambda row, spec: "tie" if row["tie"] else None)
"""Local files, and sets beside the six."""


def source_of(spec: SourceSpec) -> Source:
    """The source that a spec speaks of."""
    return SOURCES[spec.name] if spec.is_known else OTHER


def revision_of(spec: SourceSpec) -> str:
    """The commit or branch of the hub that a source is read at."""
    return spec.revision or source_of(spec).revision


def download(spec: SourceSpec, hub: str | None, out: Path, commit: str | None = None) -> dict[str, Any]:
    """Bring a source's rows into `out` as {split}/NNNN.parquet.

    hub: a mirror folder in the hub's layout (`<hub>/<name>/...`), or None for the hub itself (`HF_ENDPOINT`, `HF_TOKEN`
    and `HF_HUB_OFFLINE` count there).  commit: the one that is wanted, where the branch may move on meanwhile.  Returns
    rows by split, bytes, and the revision: the resolved commit, or "local".
    ValueError for what the user can mend, ConnectionError where the hub does not answer (worth another try).
    """
    if spec.path is not None:
        rows = _write_local(spec, Path(spec.path), out)
        revision = "local"
    else:
        if hub is not None:
            root, revision = mirror_folder(spec.name, Path(hub)), "local"
        else:
            patterns = [pattern for split in _splits(spec) for pattern in layouts(split)]
            root, revision = snapshot(spec.name, revision_of(spec), patterns, commit)
        rows = _copy_parquet(spec, root, out) if spec.is_known else _write_other(spec, root, out)
    size = sum(file.stat().st_size for file in out.rglob("*.parquet"))
    return {"rows": rows, "bytes": size, "revision": revision}


def _splits(spec: SourceSpec) -> list[str]:
    return [split for splits in source_of(spec).sides.values() for split in splits]


def rows_of(folder: Path) -> int:
    """The rows that `download` left in a folder."""
    return sum(pq.read_metadata(file).num_rows for file in folder.rglob("*.parquet"))


def _write_local(spec: SourceSpec, path: Path, out: Path) -> dict[str, int]:
    return {split: _write_unified(spec, split, [table], out) for split, table in read_local(path).items()}


def _write_other(spec: SourceSpec, root: Path, out: Path) -> dict[str, int]:
    files = {split: split_files(root, split) for split in _splits(spec)}
    if not files["train"]:
        raise ValueError(
            f"{spec.name} in {root} has no Parquet files of the split train ({', '.join(layouts('train'))}): "
            "complete it, or name another."
        )
    return {
        split: _write_unified(spec, split, (pq.read_table(file) for file in found), out)
        for split, found in files.items()
        if found
    }


def _write_unified(spec: SourceSpec, split: str, tables: Iterable[pa.Table], out: Path) -> int:
    (out / split).mkdir()
    rows = 0
    for number, table in enumerate(tables):
        pairs = unified(spec.name, table, spec.kind)
        pq.write_table(pairs, out / split / f"{number:04d}.parquet")
        rows += pairs.num_rows
    return rows


def mirror_folder(name: str, hub: Path) -> Path:
    """The folder of a set in a mirror."""
    if not (hub / name).is_dir():
        raise ValueError(f"The mirror {hub} has no folder {name}: correct data.hub, or leave this source out.")
    return hub / name


def commit_of(name: str, revision: str) -> str:
    """The commit that a set's branch on the hub points to now.

    Offline, or where the hub does not answer, the one that was last downloaded.  ValueError for what the user can mend,
    ConnectionError where neither is to be had.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        with _hub_errors(f"{name} (revision {revision})"):
            return str(HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT).sha)
    except ConnectionError as error:
        kept = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset") / "refs" / revision
        if not kept.is_file():
            raise
        if not is_offline_mode():
            logging.getLogger(__name__).warning("%s What was last downloaded is taken.", error)
        return kept.read_text().strip()


def snapshot(name: str, revision: str, patterns: list[str], commit: str | None = None) -> tuple[Path, str]:
    """The folder with a set's files that match a pattern, from the hub, and its commit.

    commit: the one that is wanted, where the branch `revision` may have moved on.  ValueError for what the user can
    mend, ConnectionError where the hub does not answer.
    """
    with _hub_errors(f"{name} (revision {revision})"):
        # By the branch first, so that the client keeps what it points to, for later runs offline.
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))
        if commit not in (None, folder.name):  # the client names a snapshot's folder by its commit
            folder = Path(snapshot_download(name, repo_type="dataset", revision=commit, allow_patterns=patterns))
    return folder, folder.name


@contextmanager
def _hub_errors(where: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(f"{where} is gated: accept its terms on the hub and set HF_TOKEN.") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(f"The hub has no {where}: correct the source's revision, or set HF_TOKEN.") from error
    except (OSError, httpx.HTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConnectionError(
            f"The hub gave no answer for {where}: go online, or name a mirror folder with data.hub. ({reason})"
        ) from error


def layouts(split: str) -> tuple[str, ...]:
    """Where a split's Parquet files may be: as on main (train-00000-of-00001.parquet, in data/ or at the root), or as
    in the hub's conversion (a folder per split)."""
    return (f"data/{split}-*.parquet", f"{split}-*.parquet", f"*/{split}/*.parquet")


def split_files(root: Path, split: str) -> list[Path]:
    """The split's Parquet files, in the first of the `layouts` that has some."""
    return next((found for layout in layouts(split) if (found := sorted(root.glob(layout)))), [])


def _copy_parquet(spec: SourceSpec, root: Path, out: Path) -> dict[str, int]:
    source = source_of(spec)
    rows = {}
    for split in _splits(spec):
        files = split_files(root, split)
        if not files:
            raise ValueError(
                f"{spec.name} in {root} has no Parquet files of the split {split} ({', '.join(layouts(split))}): "
                "complete the mirror."
            )
        (out / split).mkdir()
        for number, file in enumerate(files):
            check_columns(spec.name, pq.read_schema(file).names, source.columns)
            shutil.copyfile(file, out / split / f"{number:04d}.parquet")
        rows[split] = sum(pq.read_metadata(file).num_rows for file in files)
    return rows
