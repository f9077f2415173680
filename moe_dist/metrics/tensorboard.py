"""Records of TensorBoard, made here because its own writer is a thread that prints a traceback when a disk is full."""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_dist.metrics.append_file import AppendFile
from moe_dist.metrics.summary import flatten

FOLDER = "tensorboard"


def open_board(run: Path, step: int | None) -> AppendFile:
    """Return an event file of a run, not created yet.

    Args:
        step: step after which a run resumes: TensorBoard hides what earlier files have of later steps.
    """
    from tensorboard.compat.proto.event_pb2 import SessionLog  # imported here: it takes a second

    header = record(file_version="brain.Event:2", wall_time=time.time())
    if step is not None:
        header += record(session_log=SessionLog(status=SessionLog.START), step=step + 1, wall_time=time.time())
    name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
    return AppendFile(run / FOLDER / name, header)


def scalars(step: int, values: Mapping[str, Any]) -> bytes:
    """Return one record with the numbers in `values` under their dotted keys, the first dot as a slash."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    numbers = [
        Summary.Value(tag=key.replace(".", "/", 1), simple_value=value)
        for key, value in flatten(values)
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    return record(step=step, wall_time=time.time(), summary=Summary(value=numbers))


def record(**fields: Any) -> bytes:
    """Return an event in TensorFlow's record format: length and content, each with a checksum."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    RecordWriter(content).write(Event(**fields).SerializeToString())
    return content.getvalue()
