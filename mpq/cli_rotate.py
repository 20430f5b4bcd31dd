"""The sub-command `mpq rotate`."""

from mpq import commands, commands_rotate
from mpq.cli_answer import Json, Out, Source, answer


def rotate(
    model: Source,
    data: str,
    out: Out,
    seed: int = 0,
    window: int | None = None,
    max_windows: int = 64,
    batch_size: int = 8,
    json: Json = False,
) -> None:
    """Write the same function with its features mixed by orthogonal matrices (QuaRot, SpinQuant), for any later stage.

    The residual stream and the values of attention heads are rotated, as far as running the model shows that it does
    not notice; what is not, and why, is said. `mpq quantize --rotate` does the same on the way.

    Args:
      model: checkpoint folder, hub id, or `reference`.
      data: text that the rotation is found and proved on, or `reference`.
      out: folder to write: an Orbax checkpoint in the dtypes of the original.
      seed: of the rotations.
      window: tokens a window; default 256, or the model's context if that is shorter.
      max_windows: use the first so many.
      batch_size: windows a batch.
      json: print one JSON object.
    """
    text = commands.Data(data, window, max_windows, batch_size)
    answer(lambda: commands_rotate.rotate(model, text, out, seed), json, commands.show_written)
