"""Programs of this folder one after the other in one process group: starting it takes longer than most of them.

    several.py FOLDER '{"name": ["engine_steps", "2", "20"], ...}'

Each is given FOLDER/name to leave its result.json in. Run once per rank, by tests/gpu/test_two_gpus.py.
"""

import gc
import json
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    for name, (program, *arguments) in cases.items():
        print(f"{name}: {program} {' '.join(arguments)}", file=sys.stderr, flush=True)
        out = folder / name
        out.mkdir(exist_ok=True)
        import_module(f"tests.integration.programs.{program}").main([str(out), *arguments])
        torch._dynamo.reset()
        gc.collect()


if __name__ == "__main__":
    main()
