"""`make audit`: the pinned packages against the advisories on them, with pip-audit.

    python .ci/audit.py [options of pip-audit]

Fails where an advisory is found that `.ci/audit-exceptions.yaml` does not let pass, and where an exception has run out.
Where no advisories can be had, without a network or through a mirror that has none, it says so and ends well: it has
shown nothing then, and the line says that.
"""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
KEYS = {"id", "package", "reason", "until"}


def main(pins: Path, exceptions: list[dict[str, Any]], options: list[str]) -> int:
    """The exit code; what was found is printed."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(pins), "--no-deps", "--disable-pip"]
    ended = subprocess.run([*command, "--format", "json", *options], capture_output=True, text=True)
    try:
        packages = json.loads(ended.stdout)["dependencies"]
    except ValueError:
        if "ConnectionError" not in ended.stderr:  # its own fault, or an option's
            print(ended.stderr, file=sys.stderr)
            return ended.returncode or 1
        print(f"audit: NOT DONE, the advisories cannot be reached ({ended.stderr.strip().splitlines()[-1]})")
        return 0
    return report(packages, exceptions)


def report(packages: list[dict[str, Any]], exceptions: list[dict[str, Any]]) -> int:
    """The exit code for what pip-audit found; prints it."""
    audited = [package for package in packages if "vulns" in package]
    if not audited:
        print(f"audit: NOT DONE, of none of the {len(packages)} packages can advisories be had here")
        return 0
    found = [(package, advisory) for package in audited for advisory in package["vulns"]]
    faults = [fault for entry in exceptions if (fault := fault_of(entry))]
    faults += [line(package, advisory) for package, advisory in found if not excepted(package, advisory, exceptions)]
    print("\n".join(faults))
    skipped = f", {len(packages) - len(audited)} are unknown there" if len(audited) < len(packages) else ""
    print(f"audit: {len(audited)} packages, {len(found)} advisories, {len(faults)} to mend{skipped}")
    return 1 if faults else 0


def fault_of(entry: dict[str, Any]) -> str | None:
    """What is wrong with an exception."""
    if set(entry) != KEYS or not isinstance(entry["until"], date):
        return f"exception {entry}: needs {', '.join(sorted(KEYS))}, and until as a date"
    return f"exception {entry['id']} has run out: read the advisory again" if entry["until"] < date.today() else None


def excepted(package: dict[str, Any], advisory: dict[str, Any], exceptions: list[dict[str, Any]]) -> bool:
    """Whether a person has let an advisory on this package pass."""
    ids = {advisory["id"], *advisory["aliases"]}
    return any(entry.get("id") in ids and entry.get("package") == package["name"] for entry in exceptions)


def line(package: dict[str, Any], advisory: dict[str, Any]) -> str:
    """An advisory, and what mends it."""
    fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
    return (
        f"{package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}: {advisory['description'][:200]}"
    )


if __name__ == "__main__":
    exceptions = yaml.safe_load((HERE / "audit-exceptions.yaml").read_text())
    sys.exit(main(HERE.parent / "constraints.txt", exceptions, sys.argv[1:]))
