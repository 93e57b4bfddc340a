"""Put a finished run under savedModel/: the best network, its record, log and small events.

    python -m tools.export RUN savedModel/MNIST/lr_0.1_lambada_0.02_rs_1000

Left out are the optimizer's state, most of TensorBoard's events, and the folders of the machine: of
an absolute path the last part stays. ``savedModel/SHA256SUMS`` gets the new file's line.
"""

import argparse
import json
import re
import shlex
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from tools.scripts import ROOT
from utils.checkpoints import load_checkpoint
from utils.errors import UserError, run_script
from utils.networks import sha256_of
from utils.run_folder import BEST, serialized, write_atomic

STEPS, PICTURES = 200, 2


def portable(value: Any) -> Any:
    """The last part of an absolute path, also in ``--flag=path``; anything else as it is."""
    return re.sub(r"^(--\w+=)?/.*?([^/]*)/*$", r"\1\2", value) if isinstance(value, str) else value


def thin(scalars: Path, output: Path) -> None:
    """Copy an even selection of every tag's events, but no text: that holds the command.

    Of a step that a resumed run wrote again, the last event counts.
    """
    found: dict[str, dict[int, Event]] = defaultdict(dict)
    for path in sorted(scalars.glob("*tfevents*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name != "text":
                    alone = {"wall_time": event.wall_time, "summary": Summary(value=[value])}
                    found[value.tag][event.step] = Event(step=event.step, **alone)
    kept = [Event(file_version="brain.Event:2")]
    for by_step in found.values():
        events = [by_step[step] for step in sorted(by_step)]
        is_image = events[0].summary.value[0].HasField("image")
        count = min(len(events), PICTURES if is_image else STEPS)
        kept += [events[round(i * (len(events) - 1) / max(1, count - 1))] for i in range(count)]
    output.mkdir(parents=True)
    with open(output / "events.out.tfevents.0.export", "wb") as file:
        for event in kept:
            RecordWriter(file).write(event.SerializeToString())


def export(run: Path, target: Path, root: Path = ROOT / "savedModel") -> None:
    """Copy the run folder ``run`` to ``target``, a new folder below ``root``, or UserError."""
    if target.exists() or root.resolve() not in target.resolve().parents:
        raise UserError(f"{target}: allowed is a new folder below {root.name}/")
    kept = load_checkpoint(run / BEST)
    kept = {key: value for key, value in kept.items() if key not in ("optimizer", "training")}
    kept["args"] = {key: portable(value) for key, value in kept["args"].items()}
    record = json.loads((run / "args.json").read_text(encoding="utf-8"))
    record["arguments"] = {key: portable(value) for key, value in record["arguments"].items()}
    record["command"] = shlex.join(map(portable, shlex.split(record["command"])))
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    thin(run / "scalars", partial / "scalars")
    write_atomic(partial / BEST, serialized(kept))
    write_atomic(partial / "args.json", (json.dumps(record, indent=2) + "\n").encode())
    shutil.copyfile(run / "log.txt", partial / "log.txt")
    partial.rename(target)
    sums = root / "SHA256SUMS"
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.exists() else []
    name = (target / BEST).resolve().relative_to(root.resolve()).as_posix()
    lines = [line for line in lines if line[66:] != name] + [f"{sha256_of(target / BEST)}  {name}"]
    lines.sort(key=lambda line: line[66:])
    write_atomic(sums, ("\n".join(lines) + "\n").encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("target", type=Path, help="new folder below savedModel/")
    args = parser.parse_args()
    export(args.run, args.target)
    return 0


if __name__ == "__main__":
    run_script(main)
