"""Put a finished run under savedModel/: the best network, its record, log and small events.

    python -m tools.publish RUN savedModel/MNIST/lr_0.1_lambada_0.02_rs_1000

What is left out: the optimizer and the state of the training, steps and pictures of TensorBoard
beyond an even selection, and the folders of the machine that trained (absolute paths become the
defaults of their flags). ``savedModel/SHA256SUMS`` gets the new file's line.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from tools.thin_events import thin
from utils.board import CARD
from utils.errors import UserError, run_script
from utils.runs import BEST, load_checkpoint, save_checkpoint, sha256_of, write_atomic

PLACE = Path(__file__).resolve().parent.parent / "savedModel"
KEPT = (
    "epoch", "state_dict", "acc", "best_acc", "arch", "dataset", "classes", "args", "measured",
    "versions",
)  # fmt: skip
ELSEWHERE = {
    "data_dir": "./data",
    "save_dir": "SavedModels",
    "checkpoint": None,
    "resume": None,
    "pretrained": None,
}


def without_machine(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with absolute folders replaced by what stands for them."""
    return {
        name: ELSEWHERE[name]
        if name in ELSEWHERE and isinstance(value, str) and Path(value).is_absolute()
        else value
        for name, value in arguments.items()
    }


def command_without_machine(command: str) -> str:
    """The same for a command line: a flag whose folder has no stand-in goes, too."""
    words: list[str] = []
    for word in shlex.split(command):
        if not Path(word).is_absolute():
            words.append(word)
        elif not words:
            words.append(Path(word).name)  # the script
        else:
            stands = ELSEWHERE.get(words[-1].lstrip("-").replace("-", "_"))
            words = [*words, stands] if stands else words[:-1]
    return shlex.join(words)


def publish(run: Path, target: Path, place: Path = PLACE) -> list[str]:
    """Copy the run folder ``run`` to ``target``, below ``place``; returns the files' names.

    Raises:
        UserError: no such run, or ``target`` is there already or elsewhere.
    """
    if target.exists():
        raise UserError(f"{target} exists, allowed is a new folder")
    if place.resolve() not in target.resolve().parents:
        raise UserError(f"{target}: allowed is a folder below {place.name}/")
    checkpoint = load_checkpoint(run / BEST)
    missing = [name for name in KEPT if name not in checkpoint]
    if missing:
        raise UserError(f"{run / BEST} has no {', '.join(missing)}; it was not trained here")
    record = json.loads((run / "args.json").read_text(encoding="utf-8"))
    record["arguments"] = without_machine(record["arguments"])
    record["command"] = command_without_machine(record["command"])
    kept = {name: checkpoint[name] for name in KEPT}
    kept["args"] = without_machine(kept["args"])
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_checkpoint(partial / BEST, kept)
    write_atomic(partial / "args.json", (json.dumps(record, indent=2) + "\n").encode())
    write_atomic(partial / "log.txt", (run / "log.txt").read_bytes())
    thin(run / "scalars", partial / "scalars", steps=200, pictures=2, without=(CARD,))
    partial.rename(target)
    name = (target / BEST).resolve().relative_to(place.resolve()).as_posix()
    sums = place / "SHA256SUMS"
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.exists() else []
    lines = [line for line in lines if line[66:] != name]
    lines.append(f"{sha256_of(target / BEST)}  {name}")
    lines.sort(key=lambda line: line[66:])
    write_atomic(sums, ("\n".join(lines) + "\n").encode())
    return sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("target", type=Path, help="folder to make below savedModel/")
    args = parser.parse_args()
    print("\n".join(publish(args.run, args.target)))
    return 0


if __name__ == "__main__":
    run_script(main)
