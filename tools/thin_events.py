"""Copy a run's TensorBoard events into one small file, to be kept beside a published checkpoint.

    python -m tools.thin_events RUN/scalars savedModel/MNIST/RUN/scalars

Every value of every epoch is kept; of the steps and of the pictures an even selection, which holds
the first and the last.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from utils.board import event_files, records
from utils.errors import UserError, run_script
from utils.runs import write_atomic


def even_selection(steps: list[int], count: int) -> set[int]:
    """At most ``count`` of the sorted steps, evenly spread, the first and the last among them."""
    if len(steps) <= count:
        return set(steps)
    if count == 1:
        return {steps[-1]}
    return {steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)}


def thin(
    log_dir: str | Path,
    output: str | Path,
    steps: int = 500,
    pictures: int = 4,
    without: Collection[str] = (),
) -> int:
    """Write the thinned events of ``log_dir`` to the folder ``output``; returns their bytes.

    Args:
        log_dir: folder with event files.
        output: folder to be written, without event files of its own.
        steps: training steps kept.
        pictures: image grids kept.
        without: groups of tags to leave out.

    Raises:
        UserError: no events there, or some here already.
    """
    output = Path(output)
    if event_files(output):
        raise UserError(f"{output} holds event files, allowed is a folder without")
    found = [pair for path in event_files(log_dir) for pair in records(path.read_bytes())]
    if not any(event.summary.value for _, event in found):
        raise UserError(f"{log_dir} holds no event files, allowed is a run's scalars folder")
    limits = {"Loss_iter": steps, "Images": pictures}
    seen = defaultdict(set)
    for _, event in found:
        for value in event.summary.value:
            seen[value.tag.partition("/")[0]].add(event.step)
    kept = {group: even_selection(sorted(seen[group]), count) for group, count in limits.items()}
    chosen = [found[0][0]]  # the version of the format
    for record, event in found:
        groups = {value.tag.partition("/")[0] for value in event.summary.value}
        if (
            groups
            and not groups & set(without)
            and all(event.step in kept.get(group, {event.step}) for group in groups)
        ):
            chosen.append(record)
    data = b"".join(chosen)
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / event_files(log_dir)[0].name, data)
    return len(data)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log_dir", help="the scalars folder of a run")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--steps", type=int, default=500, help="steps kept (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=4, help="grids kept (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 1 or args.pictures < 1:
        raise UserError("--steps and --pictures must be at least 1")
    size = thin(args.log_dir, args.output, args.steps, args.pictures)
    print(f"{args.output}: {size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    run_script(main)
