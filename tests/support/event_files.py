"""Readers of TensorBoard's event files."""

import warnings


def read_scalars(folder):
    """Return the (step, value) pairs of each scalar by its tag, as TensorBoard reads them from a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
