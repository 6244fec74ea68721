"""Real `tensorboard` on both sides of hone's event files.

python tests/scripts/tensorboard_events.py write tests/fixtures/tensorboard_event.bin   # one event by its own writer
python tests/scripts/tensorboard_events.py read FOLDER                                   # what it reads of hone's files
"""
import io
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


def write(place):
    values = [Summary.Value(tag="train/loss", simple_value=1.5), Summary.Value(tag="eval/loss", simple_value=0.25)]
    event = Event(wall_time=1700000000.5, step=300, summary=Summary(value=values))
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    open(place, "wb").write(buffer.getvalue())


def read(folder):
    events = EventAccumulator(folder)
    events.Reload()
    for tag in events.Tags()["scalars"]:
        print(tag, [(point.step, round(point.value, 6)) for point in events.Scalars(tag)])


{"write": write, "read": read}[sys.argv[1]](sys.argv[2])
