"""The tables as Markdown, made of the facts alone: the same facts give the same text."""

import json
import shlex
import statistics
from collections.abc import Iterable
from pathlib import Path

from tables_runs import ROWS, Run, facts_of, run_of

from dsnet_jax.errors import InputError
from dsnet_jax.writing import write_text

NOTHING = "–"
RUNS = "runs"  # Where the workdirs lie in the commands that are shown.


def update_page(page: Path, folder: Path, fields: Iterable[str] = ()) -> None:
    """Writes the tables into a page, each between its two marker lines; what else the page holds stays.

    Args:
      page: a Markdown file; a missing one is made.
      folder: of the facts, beside the page.
      fields: `--config.FIELD=VALUE` that all runs had: they are trials then, and the page says so.

    Raises:
      InputError: the page lacks a marker.
    """
    blocks = {"cpu": _cpu(folder, fields), "paper": "\n\n".join(_paper(folder, fields))}
    if not page.exists():
        page.parent.mkdir(parents=True, exist_ok=True)
        empty = "\n\n".join("\n".join(_markers(name)) for name in blocks)
        page.write_text(f"# A trial, no results: {shlex.join(fields)}\n\n{empty}\n" if fields else f"{empty}\n")
    text = page.read_text()
    for name, block in blocks.items():
        begin, end = _markers(name)
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            raise InputError(f"{page}: the lines {begin!r} and {end!r} are needed, each once and in this order")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{block}\n\n{end}{rest.partition(end)[2]}"
    if text != page.read_text():
        write_text(page, text)


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- scripts/tables.py writes from here: {name} -->", f"<!-- to here: {name} -->"


def _table(headings: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Markdown; the first `left` columns stand on the left, the others, figures, on the right."""
    rule = ["---" if column < left else "---:" for column in range(len(headings))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, rule, *rows])


def _seeds(row: dict, folder: Path, fields: Iterable[str]) -> dict[int, dict]:
    """The facts of a row's finished runs, by seed."""
    name = run_of(row, 0).name.removesuffix("0")
    kept = (file.stem.removeprefix(name) for file in folder.glob(f"{name}*.json"))
    seeds = sorted(int(seed) for seed in kept if seed.isdecimal())
    found = {seed: facts_of(run_of(row, seed), folder, fields) for seed in seeds}
    return {seed: facts for seed, facts in found.items() if facts}


def _percent(values: Iterable[float | None], digits: int = 2) -> str:
    """The mean of fractions, and of several also the least and the largest."""
    values = [100 * value for value in values if value is not None]
    if not values:
        return NOTHING
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _cpu(folder: Path, fields: Iterable[str]) -> str:
    rows = [(row, _seeds(row, folder, fields)) for row in ROWS["cpu"]]
    every = [facts for _, seeds in rows for facts in seeds.values()]
    example = run_of(ROWS["cpu"][0], 0)
    train, evaluate = (shlex.join(["dsnet", *command]) for command in example.commands(RUNS, example.flags(RUNS)))
    trial = f" All with `{shlex.join(fields)}`." if fields else ""
    lines = [
        f"{len(every)} runs, of {sum(bool(seeds) for _, seeds in rows)} of {len(rows)} systems.{trial} Figures are "
        'means of the runs, in brackets the least and the largest. "To the grid" is the mean difference to CGDS on the '
        "regular grid, over the seeds that both have, in brackets each; boundary IoU is that of Cheng et al. (CVPR "
        "2021). Offsets are in pixels of the sampled map: their mean and the share of points outside of the map at the "
        "last step (grids at its edge reach out of it without any offsets), and the largest that a run logged. Minutes "
        "are those of the steps alone, of the quickest run.",
        _comparison(rows),
        "One run after another: `python scripts/tables.py --scale=cpu`; or by hand, for instance:",
        f"```bash\n{train}\n{evaluate}\n```",
    ]
    if every:
        lines += ["IoU of the classes, %, mean of the seeds:", _classes(rows), "The runs:", _runs(rows, folder)]
    return "\n\n".join(lines)


def _comparison(rows: list[tuple[dict, dict]]) -> str:
    regular = next(seeds for row, seeds in rows if row["config"].endswith(":regular"))
    columns = (("mean", statistics.mean, 1, 2), ("largest", max, 1, 1), ("outside", statistics.mean, 100, 1))
    lines = []
    for row, seeds in rows:
        scores = [facts["scores"]["ss"] for facts in seeds.values()]
        both = [] if seeds is regular else [seed for seed in seeds if seed in regular]
        gains = [100 * (_miou(seeds[seed]) - _miou(regular[seed])) for seed in both]
        offsets = [facts["offsets"] for facts in seeds.values() if facts["offsets"]]
        lines.append(
            [
                row["system"],
                f"`{row['config'].partition(':')[2]}`",
                str(len(seeds)),
                _percent(score["miou"] for score in scores) if scores else "not run",
                _gain(gains),
                _percent(score["boundary_miou"] for score in scores),
                _percent(score["pixel_accuracy"] for score in scores),
                *(
                    f"{of(offset[name] * factor for offset in offsets):.{digits}f}" if offsets else NOTHING
                    for name, of, factor, digits in columns
                ),
                f"{min(facts['minutes'] for facts in seeds.values()):.1f}" if seeds else NOTHING,
                str(row.get("paper", NOTHING)),
            ]
        )
    headings = ["system", "config", "runs", "mIoU %", "to the grid", "boundary IoU %", "pixel accuracy %"]
    headings += ["offsets: mean", "largest", "outside %", "minutes", "the paper, VOC val, R50"]
    return _table(headings, lines, left=2)


def _gain(gains: list[float]) -> str:
    """The mean of differences, and of several also each."""
    if not gains:
        return NOTHING
    each = f" ({', '.join(f'{gain:+.2f}' for gain in gains)})" if len(gains) > 1 else ""
    return f"{statistics.mean(gains):+.2f}{each}"


def _miou(facts: dict) -> float:
    return facts["scores"]["ss"]["miou"]


def _classes(rows: list[tuple[dict, dict]]) -> str:
    rows = [(row, [facts["scores"]["ss"]["iou"] for facts in seeds.values()]) for row, seeds in rows if seeds]
    names = list(rows[0][1][0])
    lines = []
    for row, ious in rows:
        values = [[iou[name] for iou in ious if iou[name] is not None] for name in names]
        lines.append([row["system"], *(f"{100 * statistics.mean(of):.1f}" if of else NOTHING for of in values)])
    return _table(["system", *names], lines)


def _runs(rows: list[tuple[dict, dict]], folder: Path) -> str:
    lines = [
        [
            f"`{facts['config'].partition(':')[2]}`",
            str(seed),
            f"{100 * _miou(facts):.2f}",
            str(facts["epochs"]),
            f"{facts['steps']:,}",
            f"{facts['minutes']:.1f}",
            facts["date"],
            facts["hardware"],
            facts["version"],
            _files(run_of(row, seed), folder),
        ]
        for row, seeds in rows
        for seed, facts in seeds.items()
    ]
    headings = ["config", "seed", "mIoU %", "epochs", "steps", "minutes", "date", "hardware", "dsnet_jax", "files"]
    return _table(headings, lines)


def _files(run: Run, folder: Path) -> str:
    """Links from a page beside the folder of facts."""
    return f"[facts]({folder.name}/{run.name}.json), [log]({folder.name}/{run.name}.jsonl)"


def _paper(folder: Path, fields: Iterable[str]) -> list[str]:
    """Every table of the paper: heading, rows, notes, commands."""
    parts = [
        "*published*: the paper's figure, quoted; no run of ours stands beside it. Of several seeds the "
        "mean is given, in brackets the least and the largest. `ss`: single scale; `flip`: and its mirror image; "
        "`ms_flip`: both at six scales. All runs in turn: `python scripts/tables.py --scale=paper`. They start from "
        "torchvision's ImageNet weights, which these commands lay where the configs look for them:",
        "```bash\ndsnet port resnet50-0676ba61.pth --workdir=weights/resnet50\n"
        "dsnet port resnet101-63fe2227.pth --workdir=weights/resnet101\n```",
    ]
    for table in ROWS["paper"]:
        rows = [_paper_row(row, folder, fields) for row in table["rows"]]
        headings = ["system", "the paper, mIoU %", "ours", "protocol", "seeds", "steps", "hardware", "files"]
        parts += [f"### {table['title']}", f"{table['where']}.", _table(headings, rows)]
        if "classes" in table:
            lines = [[row["system"], *(f"{iou:.1f}" for iou in row["classes"])] for row in table["rows"]]
            parts += ["Its columns, all of them the paper's:", _table(["IoU %", *table["classes"]], lines)]
        parts += ["\n".join(f"- {note}" for note in table["notes"]), f"```bash\n{_commands(table)}\n```"]
    return parts


def _paper_row(row: dict, folder: Path, fields: Iterable[str]) -> list[str]:
    paper = f"{row['paper']:.2f}".removesuffix("0") if "paper" in row else NOTHING
    if "config" not in row:
        return [row["system"], paper, "*published*", *[NOTHING] * 5]
    of, out_of = row.get("factor", (1, 1))
    protocol, on_server = row["protocol"], row.get("split") == "test"
    seeds = _seeds(row, folder, fields)
    seeds = {seed: facts for seed, facts in seeds.items() if on_server or protocol in facts["scores"]}
    if not seeds:
        return [row["system"], paper, "not run", f"`{protocol}`", *[NOTHING] * 4]
    found = list(seeds.values())
    if on_server:
        answers = [answer for seed in seeds if (answer := _answer_of_server(run_of(row, seed), folder))]
        mious, pages = [answer["miou"] for answer in answers], [f"[answer]({answer['url']})" for answer in answers]
        ours = f"{_percent(mious)}: {', '.join(pages)}" if answers else "trained; the server has to score it"
    else:
        ours = _percent(facts["scores"][protocol]["miou"] * of / out_of for facts in found)
    return [
        row["system"],
        paper,
        ours,
        f"`{protocol}`",
        ", ".join(map(str, seeds)),
        f"{found[0]['steps']:,}",
        ", ".join(dict.fromkeys(facts["hardware"] for facts in found)),
        "; ".join(_files(run_of(row, seed), folder) for seed in seeds),
    ]


def _answer_of_server(run: Run, folder: Path) -> dict | None:
    """What a benchmark's server says of a run, written by hand beside its facts: `miou`, a fraction, and `url`."""
    file = folder / f"{run.name}.server.json"
    return json.loads(file.read_text()) if file.exists() else None


def _commands(table: dict) -> str:
    """What trains and scores the rows of a table by hand, each once."""
    commands = []
    for row in table["rows"]:
        if "config" in row:
            run = run_of(row, 0)
            if run.after:
                commands += run.before.commands(RUNS, run.before.flags(RUNS))[:1]
            commands += run.commands(RUNS, run.flags(RUNS))
    return "\n".join(dict.fromkeys(shlex.join(["dsnet", *command]) for command in commands))
