"""TensorBoard event files of a run's journal: one folder for each stage, and the run's own folder for evaluations.

MLflow stays the system of record: these files hold what the journal holds. The journal decides which points count, so a
step that a resumed run repeats is written once, and a `rewind` voids the later points of its stage.

Every writer begins new files and then deletes those of earlier ones, so that no cursor has to survive a crash. Each new
file begins with a session start at step 0, and each rewind writes one, at which TensorBoard drops the points it has
read from that step on: one that is open meanwhile shows no point twice.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.config.urls import is_local, local_path
from pipeline.tracking.journal import Journal, Record
from pipeline.tracking.locations import journal_folder

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

SUFFIX = ".mome"  # of our event files; others are never deleted
INSTALL = "TensorBoard is not installed: pip install 'mome[tensorboard]'"


def tensorboard_folder(config: RunConfig) -> Path | None:
    """Return the folder of the run's event files, on this machine even if the run's folder is remote; None if off."""
    if not config.tracking.tensorboard:
        return None
    run = local_path(config.folder) if is_local(config.folder) else journal_folder(config.folder).parent
    return run / "tensorboard"


def check_installed(config: RunConfig) -> None:
    """Raise ConfigError if the run writes event files and TensorBoard is not installed."""
    if config.tracking.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError(f"tracking.tensorboard: {INSTALL}, or set tracking.tensorboard=false")


class EventFiles:
    """Writes a journal as event files below `folder`. Raises ConfigError without TensorBoard."""

    def __init__(self, journal: Journal, folder: Path):
        if find_spec("tensorboard") is None:
            raise ConfigError(INSTALL)
        self._journal, self._folder = journal, folder
        self._offsets: dict[Path, int] = {}  # session -> number of its bytes that are written
        self._writers: dict[Path, EventFileWriter] = {}
        self._stages: dict[int, str] = {}  # stage index -> folder
        self.num_points = 0

    def write(self) -> None:
        """Write what the journal has grown by. Raises OSError."""
        for session in self._journal.sessions():
            for offset, record in self._journal.records(session, self._offsets.get(session, 0)):
                self._offsets[session] = offset
                self._write_record(record)
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _write_record(self, record: Record) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        kind, stage = record["kind"], record["stage"]
        if kind == "stage":
            self._stages[stage] = f"{stage}-{record['name']}".replace("/", "-")
        elif kind == "metrics":
            values = [Summary.Value(tag=key, simple_value=float(value)) for key, value in record["values"].items()]
            self.num_points += len(values)
            self._add(record, step=record["step"], summary=Summary(value=values))
        elif kind == "rewind":
            self._add(record, step=record["step"] + 1, session_log=SessionLog(status=SessionLog.START))
        elif kind == "artifact" and record["name"] == "config.yaml" and (file := self._journal.file(record["file"])):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            text = TensorProto(
                dtype="DT_STRING",
                string_val=["\n".join(f"    {line}" for line in lines).encode()],  # Markdown: a block of code
                tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
            )
            plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
            shown = Summary.Value(tag="config/text_summary", metadata=plugin, tensor=text)
            self._add(record, step=0, summary=Summary(value=[shown]))

    def _add(self, record: Record, **event: Any) -> None:
        """Add an event to the files of the record's stage; the first one replaces those of earlier writers."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        stage, seconds = record["stage"], record["at"] / 1000
        folder = self._folder if stage is None else self._folder / self._stages.get(stage, str(stage))
        if (writer := self._writers.get(folder)) is None:
            earlier = list(folder.glob(f"events.out.tfevents.*{SUFFIX}"))
            self._writers[folder] = writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
            writer.add_event(Event(wall_time=seconds, step=0, session_log=SessionLog(status=SessionLog.START)))
            writer.flush()
            for path in earlier:
                path.unlink(missing_ok=True)
        writer.add_event(Event(wall_time=seconds, **event))
