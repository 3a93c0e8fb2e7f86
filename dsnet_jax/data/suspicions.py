"""What may be wrong with a data set: told, not judged. Some of it is as it should be."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dsnet_jax.data.survey import Look, Seen

NEARLY_CONSTANT = 4.0  # Grey levels: the standard deviation of the channel that varies most.
UNUSUAL_ASPECT = 2.5  # Times the split's median of width over height, or less than its reciprocal.
SHARES_DIFFER = 3.0  # Times the class's share in another split, where the larger one is at least
LEAST_SHARE = 0.001  # of the labelled pixels.


@dataclass(frozen=True)
class Finding:
    """Something suspicious.

    Attributes:
      what: a line that says it.
      names: of what it is about: images, as `split/id`, or classes; there may be none.
    """

    what: str
    names: list[str]


def suspicious(looks: Sequence[Look]) -> list[Finding]:
    """What may be wrong in one of the splits, or between them."""
    findings = []
    for look in looks:
        findings += _suspicious_images(look) + _missing_classes(look) + _repeated(look)
    for first, second in itertools.combinations(looks, 2):
        findings += _shared(first, second)
    return findings + _differing_shares(looks)


def _suspicious_images(look: Look) -> list[Finding]:
    of_classes = slice(0, look.spec.num_classes)
    aspect = float(np.median([width / height for height, width in (one.size_hw for one in look.seen)]))

    def is_unusual(one: Seen) -> bool:
        times = one.size_hw[1] / one.size_hw[0] / aspect
        return max(times, 1 / times) > UNUSUAL_ASPECT

    kinds = {
        f"hardly vary: no channel's standard deviation is above {NEARLY_CONSTANT:g} of 255 grey levels": [
            one for one in look.seen if one.deviation <= NEARLY_CONSTANT
        ],
        f"have unusual proportions: width / height is {UNUSUAL_ASPECT:g} times away from the median, {aspect:.2f}": [
            one for one in look.seen if is_unusual(one)
        ],
        "have labels of another size": [one for one in look.labelled if one.label_hw != one.size_hw],
        "have only ignored labels": [one for one in look.labelled if not one.label_pixels[of_classes].any()],
        "have labels of one class only": [
            one for one in look.labelled if np.count_nonzero(one.label_pixels[of_classes]) == 1
        ],
    }
    return [
        Finding(f"{look.name}: {len(found)} of {len(look.seen)} images {what}", _names(look, found))
        for what, found in kinds.items()
        if found
    ]


def _missing_classes(look: Look) -> list[Finding]:
    if not look.labelled:
        return []
    names = [name for name, share in zip(look.spec.class_names, look.class_shares, strict=True) if not share]
    if not names:
        return []
    return [Finding(f"{look.name}: {len(names)} of {look.spec.num_classes} classes never occur", names)]


def _repeated(look: Look) -> list[Finding]:
    """Images that are in a split more than once."""
    groups = [group for group in _by_pixels(look).values() if len(group) > 1]
    if not groups:
        return []
    again = sum(len(group) - 1 for group in groups)
    differing = sum(len({one.label_digest for one in group}) > 1 for group in groups)
    what = f"{look.name}: {again} of {len(look.seen)} images are exact copies of others"
    if differing:
        what += f", {differing} of the {len(groups)} pictures with different labels"
    return [Finding(what, [" = ".join(_names(look, group)) for group in groups])]


def _shared(first: Look, second: Look) -> list[Finding]:
    """Images that are in two splits."""
    theirs = _by_pixels(second)
    pairs = [(one, theirs[one.image_digest][0]) for one in first.seen if one.image_digest in theirs]
    if not pairs:
        return []
    what = f"{first.name} and {second.name} share {len(pairs)} images: a network trained on one must not be scored on "
    what += "the other"
    both_labelled = [(mine, other) for mine, other in pairs if mine.label_digest and other.label_digest]
    if differing := sum(mine.label_digest != other.label_digest for mine, other in both_labelled):
        what += f"; {differing} of them have other labels there"
    return [Finding(what, [" = ".join([*_names(first, [mine]), *_names(second, [other])]) for mine, other in pairs])]


def _by_pixels(look: Look) -> dict[bytes, list[Seen]]:
    groups = defaultdict(list)
    for one in look.seen:
        groups[one.image_digest].append(one)
    return groups


def _differing_shares(looks: Sequence[Look]) -> list[Finding]:
    """Classes much more frequent in one split than in another. Those that are missing in one are told elsewhere."""
    labelled = [look for look in looks if look.labelled]
    findings = []
    for label, name in enumerate(looks[0].spec.class_names):
        shares = sorted((float(look.class_shares[label]), look.name) for look in labelled if look.class_shares[label])
        if len(shares) > 1:
            (least, rare), (most, frequent) = shares[0], shares[-1]
            if most >= LEAST_SHARE and most > SHARES_DIFFER * least:
                times = f"{most / least:.1f} times as frequent in {frequent} ({most:.2%}) as in {rare} ({least:.2%})"
                findings.append(Finding(f"{name} is {times}", []))
    return findings


def _names(look: Look, seen: Iterable[Seen]) -> list[str]:
    return [f"{look.name}/{one.id}" for one in seen]
