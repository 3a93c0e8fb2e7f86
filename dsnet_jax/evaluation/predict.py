"""Labels images that are in no data set: `dsnet predict`."""

import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from etils import epath

from dsnet_jax import parallel
from dsnet_jax.data.decoding import IMAGE_EXTENSIONS, MAX_PIXELS, decode_image, is_rotated, read_size_hw
from dsnet_jax.data.drawing import overlay, write_picture
from dsnet_jax.data.files import check_printable, read_file
from dsnet_jax.data.pipeline import Example, example_of
from dsnet_jax.data.transforms import scaled_size_hw
from dsnet_jax.errors import InputError, writing_into
from dsnet_jax.evaluation.canvases import canvas_hw
from dsnet_jax.evaluation.inference import Segmenter
from dsnet_jax.evaluation.passes import scaled_canvases
from dsnet_jax.evaluation.pictures import write_labels
from dsnet_jax.evaluation.protocols import FIELDS, Protocol, protocol_named
from dsnet_jax.evaluation.trained import load_trained
from dsnet_jax.progress import track
from dsnet_jax.writing import LONGEST_NAME, check_writable, is_remote

# Of the canvas that an image is computed on; 4000 x 3000 fits. Of memory, in float32 on a CPU, the compiled program and
# the pictures take 520 bytes a pixel for ResNet-50 at output stride 16 (7 GB), ResNet-101 at 8 takes 1650 (21 GB).
LABELLED_PIXELS = 4096 * 3072
# Of predictions at a time: two PNGs of a photograph take longer than a device takes to label it, and memory meanwhile.
WRITERS = 4


def predict_files(
    workdir: epath.PathLike,
    step: int | str | None,
    inputs: Sequence[str],
    output: epath.PathLike,
    max_pixels: int | None = None,
    protocol: str = "ss",
    config_flags: Sequence[str] = (),
) -> int:
    """Labels image files and writes two pictures for each: `<name>.png` and `<name>_overlay.png`.

    The first is a palette PNG of the image's size whose index is the class; the second shows the classes' colours over
    the image. Images are computed one by one, at their own size times `config.data.image_scale`. What cannot be read,
    or is too large, is named and counted, and the rest goes on. An EXIF orientation is not applied, which is counted.

    Args:
      workdir: of the run.
      step: of the checkpoint; "best"; None: the last.
      inputs: image files, and folders, of which files with the ending of an image are taken, not deeper ones.
      output: folder for the pictures; made if it is not there.
      max_pixels: of the largest canvas on which an image is computed, enlarged and mirrored as the protocol does it;
        what needs more is not decoded. None: `LABELLED_PIXELS`.
      protocol: one of `protocols.NAMES`.
      config_flags: see `load_trained`.

    Returns:
      How many files could not be labelled.

    Raises:
      InputError: the run cannot be used, a folder cannot be read, there is no image, two would be written to one place,
        `output` is where an image lies, a name is too long or no plain text, there is no such protocol, or `output`
        cannot be written.
    """
    limit = LABELLED_PIXELS if max_pixels is None else max_pixels
    files, others, folders = _image_files(inputs)
    output = epath.Path(output)
    names = _output_names(files, output)
    otherwise = "give another --output"
    check_writable(output, otherwise)
    trained = load_trained(workdir, step, config_flags, FIELDS.get(protocol, ()))
    seen = protocol_named(protocol, trained.config)
    with writing_into(output, otherwise):
        output.mkdir(parents=True, exist_ok=True)
    failed, rotated, originals = [], [], {}

    def readable(files: Sequence[Path]) -> Iterator[Example]:
        for index, file in enumerate(track(files, "labelling images")):
            try:
                data = read_file(file)
                image = _decoded(data, file, trained.config.data.image_scale, seen, limit)
            except InputError as error:
                failed.append(file)
                print(f"dsnet: {error}", file=sys.stderr)
                continue
            if is_rotated(data, str(file)):
                rotated.append(file)
            originals[index] = image
            yield example_of(index, str(file), image, None, trained.config.data.image_scale)

    def write(name: str, image: np.ndarray, prediction: np.ndarray) -> None:
        picture = overlay(image, prediction, trained.spec)
        with writing_into(output, otherwise):
            write_labels(output / f"{name}.png", prediction, trained.spec.palette)
            write_picture(output / f"{name}_overlay.png", picture)

    segmenter = Segmenter(trained.model, trained.variables, parallel.local_mesh(), seen)
    writing = deque()
    with ThreadPoolExecutor(WRITERS) as pool:
        for batch, labels, _ in segmenter.run(readable(files), batch_size=1):
            for example, prediction in batch.cropped(labels):
                original, name = originals.pop(example.index), names[files[example.index]]
                writing.append(pool.submit(write, name, original, prediction))
                if len(writing) > WRITERS:
                    writing.popleft().result()
        for written in writing:
            written.result()
    print(
        f"{len(files) - len(failed)} images labelled into {output}, {len(failed)} could not be read, "
        f"{others} files in the folders are not images"
        + (f", {folders} folders in them were not looked into" if folders else "")
        + (f", {len(rotated)} have an EXIF orientation, which is not applied" if rotated else "")
    )
    return len(failed)


def _decoded(data: bytes, file: Path, image_scale: float, protocol: Protocol, max_pixels: int) -> np.ndarray:
    size_hw = read_size_hw(data, str(file))
    canvas = canvas_hw(scaled_size_hw(size_hw, image_scale))
    height, width = max(canvas, *scaled_canvases(protocol, canvas))
    if height * width * (2 if protocol.flip else 1) > max_pixels:
        twice = ", and one more for the mirror image" if protocol.flip else ""
        raise InputError(
            f"{file}: {size_hw[0]} x {size_hw[1]} pixels (height x width) need a canvas of {height} x {width}{twice}, "
            f"which is more than {max_pixels} pixels: make it smaller, or raise --max-pixels if the memory is there"
        )
    return decode_image(data, str(file), max(max_pixels, MAX_PIXELS))


def _image_files(inputs: Sequence[str]) -> tuple[list[Path], int, int]:
    """The images among the inputs, each once; how many files of the folders are none; how many folders are in those.

    What only looks like an image, as a link that leads nowhere, is among them: it is told when it is read. A name that
    a terminal would not only print is an InputError.
    """
    files, others, folders = [], 0, 0
    for given in map(Path, inputs):
        if os.path.isdir(given):  # `Path.is_dir` raises, where a folder may not be entered or a name is too long.
            try:
                found = sorted(given.iterdir())
            except OSError as error:
                raise InputError(
                    f"{given}: cannot be read ({error.strerror}): give yourself the right to, or leave it out"
                ) from error
            inside = [path for path in found if not os.path.isdir(path)]
            folders += len(found) - len(inside)
            images = [path for path in inside if path.suffix.lower() in IMAGE_EXTENSIONS]
            others += len(inside) - len(images)
            files += images
        else:
            files.append(given)
    for file in files:
        check_printable(file.parent, file.name)
    if not files:
        raise InputError(f"{', '.join(inputs)}: no image found ({', '.join(sorted(IMAGE_EXTENSIONS))})")
    return list(dict.fromkeys(files)), others, folders


def _output_names(files: Sequence[Path], output: epath.Path) -> dict[Path, str]:
    """The name of each file's pictures: its own without the ending, or with it where that would be somebody else's.

    Raises:
      InputError: two files have the same name, in different folders; `output` is one of these folders, where a picture
        could replace a file; or its name would be too long.
    """
    place = os.path.realpath(output)  # `Path.resolve` raises for a link that leads to itself.
    for file in files:
        if place in (os.path.realpath(file.parent), os.path.dirname(os.path.realpath(file))):
            raise InputError(f"{output} is where {file} lies, and pictures could replace files: give another --output")
    times = Counter(file.stem for file in files)
    names = {file: file.stem if times[file.stem] == 1 else file.name for file in files}
    taken = {}
    for file, name in names.items():
        if not is_remote(output) and len(os.fsencode(f"{name}_overlay.png")) > LONGEST_NAME:
            raise InputError(f"{file}: {name}_overlay.png has more than {LONGEST_NAME} bytes: give it a shorter name")
        for written in (name, f"{name}_overlay"):
            if written in taken:
                raise InputError(
                    f"{taken[written]} and {file} would both be written to {written}.png: label them apart"
                )
            taken[written] = file
    return names
