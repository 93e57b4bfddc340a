"""What several tests need."""

from utils.run_folder import serialized, write_atomic


def save_checkpoint(path, checkpoint) -> None:
    write_atomic(path, serialized(checkpoint))
