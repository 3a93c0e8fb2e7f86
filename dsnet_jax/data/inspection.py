"""Tells what a prepared data set holds, and what in it is suspicious: `dsnet inspect data`."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsnet_jax.data.drawing import sheet, write_picture
from dsnet_jax.data.records import composed_splits, open_split, split_names
from dsnet_jax.data.specs import IGNORE_LABEL
from dsnet_jax.data.survey import PANEL_HW, Look, look_at
from dsnet_jax.data.suspicions import Finding, suspicious
from dsnet_jax.errors import listed, writing_into
from dsnet_jax.writing import write_text

COLUMNS = 6  # Of a sheet of examples.


def inspect_data(root: str, name: str, split: str | None = None, output: epath.PathLike | None = None) -> None:
    """Prints what a prepared data set holds: images, sizes, classes, and what is suspicious.

    Args:
      root: where prepared data sets lie.
      name: of the data set.
      split: the only one to look at; None: all that are stored, and those that are composed of them are counted. What
        is compared between splits is only found with several.
      output: folder, made if it is not there, for inspection.json and a sheet of examples for each split; may be gs://.

    Raises:
      InputError: the data set or the split is not there, a record cannot be decoded, or the folder cannot be written.
    """
    looks = [look_at(open_split(root, name, one)) for one in ([split] if split else split_names(root, name))]
    findings = suspicious(looks)
    console = Console()
    for table in tables(looks):
        console.print(table)
    if split is None:
        counts = {look.name: len(look.seen) for look in looks}
        for composed, parts in composed_splits(root, name).items():
            count = sum(counts[part] for part in parts)
            console.print(Text(f"{composed}: {count:,} images, those of {' and '.join(parts)}"))
    console.print(Text("sizes: height x width; shares: of the pixels not ignored; ignored: of all labels' pixels\n"))
    for look in looks:
        if look.left_out:
            console.print(Text(f"{look.name}: {len(look.left_out)} left out by --skip-bad when it was prepared"))
            for line in listed(look.left_out):
                console.print(Text(f"    {line}"))
    console.print(Text(f"{len(findings)} suspicious" if findings else "nothing suspicious"))
    for finding in findings:
        console.print(Text(f"- {finding.what}"))
        if finding.names:
            console.print(Text(f"    {', '.join(listed(finding.names))}"))
    if output is not None:
        _write(epath.Path(output), looks, findings)


def tables(looks: Sequence[Look]) -> list[Table]:
    """For the terminal: one table of the splits, and one of the classes of each split that has labels."""
    overview = Table("", title=Text(looks[0].spec.name))
    for look in looks:
        overview.add_column(Text(look.name), justify="right")
    sizes = [_sizes(look) for look in looks]
    overview.add_row("images", *(f"{len(look.seen):,}" for look in looks))
    overview.add_row("with labels", *(f"{len(look.labelled):,}" for look in looks))
    overview.add_row("ignored %", *(_percent(look.ignored_share) if look.labelled else "–" for look in looks))
    overview.add_section()
    for which in ("smallest", "largest", "commonest"):
        overview.add_row(f"{which} size", *("{} x {}".format(*found[f"{which}_hw"]) for found in sizes))
    overview.add_row("images of that", *(f"{found['commonest_images']:,}" for found in sizes))
    overview.add_row("different sizes", *(f"{found['different']:,}" for found in sizes))
    return [overview, *(_class_table(look) for look in looks if look.labelled)]


def _class_table(look: Look) -> Table:
    table = Table(title=Text(f"{look.spec.name} {look.name}"))
    table.add_column("class")
    for heading in ("pixels", "share %", "images", "of images %"):
        table.add_column(heading, justify="right")
    for row in _classes(look):
        images = f"{row['images']:,}", _percent(row["images"] / len(look.labelled))
        table.add_row(Text(row["name"]), f"{row['pixels']:,}", _percent(row["share"]), *images)
    table.add_section()
    pixels, images = look.label_pixels[IGNORE_LABEL], look.label_images[IGNORE_LABEL]
    cells = f"{pixels:,}", _percent(look.ignored_share), f"{images:,}", _percent(images / len(look.labelled))
    table.add_row("ignored", *cells)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _classes(look: Look) -> list[dict]:
    columns = look.spec.class_names, look.label_pixels.tolist(), look.class_shares.tolist(), look.label_images.tolist()
    return [dict(zip(("name", "pixels", "share", "images"), row, strict=True)) for row in zip(*columns, strict=False)]


def _sizes(look: Look) -> dict:
    counts = Counter(one.size_hw for one in look.seen)
    by_area = sorted(counts, key=lambda size_hw: (size_hw[0] * size_hw[1], size_hw))
    commonest, images = counts.most_common(1)[0]
    return {
        "different": len(counts),
        "smallest_hw": by_area[0],
        "largest_hw": by_area[-1],
        "commonest_hw": commonest,
        "commonest_images": images,
    }


def _write(folder: epath.Path, looks: Sequence[Look], findings: Sequence[Finding]) -> None:
    report = {
        "dataset": looks[0].spec.name,
        "splits": {
            look.name: {
                "images": len(look.seen),
                "labelled": len(look.labelled),
                "left_out": look.left_out,
                "sizes": _sizes(look),
                "classes": _classes(look) if look.labelled else None,
                "ignored_pixels": int(look.label_pixels[IGNORE_LABEL]),
                "ignored_share": look.ignored_share,
            }
            for look in looks
        },
        "suspicious": [dataclasses.asdict(finding) for finding in findings],
    }
    with writing_into(folder, "give another --output"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "inspection.json", json.dumps(report, indent=2) + "\n")
        for look in looks:
            write_picture(folder / f"{look.name}.png", contact_sheet(look))
    print(f"written to {folder}: inspection.json, {', '.join(f'{look.name}.png' for look in looks)}")


def contact_sheet(look: Look) -> np.ndarray:
    """The examples with their ids, and the colours of all classes that occur in the split: RGB, uint8 [H, W, 3]."""
    rows = [look.panels[start : start + COLUMNS] for start in range(0, len(look.panels), COLUMNS)]
    occurring = np.flatnonzero(look.label_pixels[: look.spec.num_classes]).tolist()
    return sheet(rows, occurring, look.spec, column=PANEL_HW[1] // 2)
