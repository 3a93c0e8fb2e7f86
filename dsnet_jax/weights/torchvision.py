"""Networks of torchvision's names and ours: which one a file holds, what each array is called, and whether it fits."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsnet_jax.models.resnet import RESNETS, Bottleneck

Table = Sequence[tuple[str, str]]  # Pattern of our module's path, and the module's name there.

# Files by the first digits of their sha256, which are also in their names.
RELEASES = {
    "f37072fd": "torchvision's ResNet-18, IMAGENET1K_V1",
    "5c106cde": "torchvision's ResNet-18, IMAGENET1K_V1, as released before 2021",
    "b627a593": "torchvision's ResNet-34, IMAGENET1K_V1",
    "333f7ec4": "torchvision's ResNet-34, IMAGENET1K_V1, as released before 2021",
    "0676ba61": "torchvision's ResNet-50, IMAGENET1K_V1",
    "19c8e357": "torchvision's ResNet-50, IMAGENET1K_V1, as released before 2021",
    "11ad3fa6": "torchvision's ResNet-50, IMAGENET1K_V2",
    "63fe2227": "torchvision's ResNet-101, IMAGENET1K_V1",
    "5d3b4d8f": "torchvision's ResNet-101, IMAGENET1K_V1, as released before 2021",
    "cd907fc2": "torchvision's ResNet-101, IMAGENET1K_V2",
    "394f9c45": "torchvision's ResNet-152, IMAGENET1K_V1",
    "b121ed2d": "torchvision's ResNet-152, IMAGENET1K_V1, as released before 2021",
    "f82ba261": "torchvision's ResNet-152, IMAGENET1K_V2",
    "1167a1af": "torchvision's FCN, ResNet-50, COCO_WITH_VOC_LABELS_V1",
    "7ecb50ca": "torchvision's FCN, ResNet-101, COCO_WITH_VOC_LABELS_V1",
    "cd0a2569": "torchvision's DeepLabv3, ResNet-50, COCO_WITH_VOC_LABELS_V1",
    "586e9e4e": "torchvision's DeepLabv3, ResNet-101, COCO_WITH_VOC_LABELS_V1",
}
# Of those before 2021, which are in PyTorch's first format, the later file with the same weights.
SAVED_AGAIN = {
    "5c106cde": "resnet18-f37072fd.pth",
    "333f7ec4": "resnet34-b627a593.pth",
    "19c8e357": "resnet50-0676ba61.pth",
    "5d3b4d8f": "resnet101-63fe2227.pth",
    "b121ed2d": "resnet152-394f9c45.pth",
}

BLOCKS: Table = tuple(
    row
    for layer in (1, 2, 3, 4)
    for row in (
        (rf"stage{layer + 1}_block(\d+)/conv(\d)", rf"layer{layer}.\1.conv\2"),
        (rf"stage{layer + 1}_block(\d+)/norm(\d)", rf"layer{layer}.\1.bn\2"),
        (rf"stage{layer + 1}_block(\d+)/downsample_conv", rf"layer{layer}.\1.downsample.0"),
        (rf"stage{layer + 1}_block(\d+)/downsample_norm", rf"layer{layer}.\1.downsample.1"),
    )
)


def _deep_stem(*names: str) -> Table:
    modules = [f"stem{i}/{part}" for i in range(3) for part in ("conv", "norm")]
    return tuple(zip(modules, names, strict=True))


STEMS: dict[str, Table] = {
    "torchvision, timm": (("stem/conv", "conv1"), ("stem/norm", "bn1")),
    "timm, PyTorch-Encoding": _deep_stem("conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1"),
    "mmsegmentation": _deep_stem("stem.0", "stem.1", "stem.3", "stem.4", "stem.6", "stem.7"),
    "semseg": _deep_stem("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"),
}

_FCN: Table = (
    ("classifier/conv/conv", "classifier.0"),
    ("classifier/conv/norm", "classifier.1"),
    ("classifier/logits", "classifier.4"),
)
_DEEPLAB: Table = (
    ("aspp/point/conv", "classifier.0.convs.0.0"),
    ("aspp/point/norm", "classifier.0.convs.0.1"),
    *((f"aspp/atrous{i}/conv", f"classifier.0.convs.{i + 1}.0") for i in range(3)),
    *((f"aspp/atrous{i}/norm", f"classifier.0.convs.{i + 1}.1") for i in range(3)),
    ("aspp/pool/conv", "classifier.0.convs.4.1"),
    ("aspp/pool/norm", "classifier.0.convs.4.2"),
    ("aspp/project/conv", "classifier.0.project.0"),
    ("aspp/project/norm", "classifier.0.project.1"),
    ("classifier/conv/conv", "classifier.1"),
    ("classifier/conv/norm", "classifier.2"),
    ("classifier/logits", "classifier.4"),
)
HEADS: dict[str, Table] = {"fcn": _FCN, "aspp": _DEEPLAB}  # By config.model.name.
AUXILIARY: Table = tuple((ours.replace("classifier", "auxiliary"), f"aux_{theirs}") for ours, theirs in _FCN)

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
LEFT_OUT = r"fc\.(weight|bias)|(.+\.)?num_batches_tracked"  # ImageNet's classes, and a counter that nothing reads.


@dataclass(frozen=True)
class Layout:
    """What a file seems to hold.

    Attributes:
      backbone: of `RESNETS`, the nearest by its blocks.
      stem: v1, v1c or v1s.
      head: a key of `HEADS`; None: a backbone alone.
      auxiliary: whether there is a second head.
      table: what our modules are called there, the prefix of those of the backbone included.
      prefix: of the backbone's names.
      width, auxiliary_width, classes: of the heads; 0 where there is none.
    """

    backbone: str
    stem: str
    head: str | None
    auxiliary: bool
    table: Table
    prefix: str
    width: int = 0
    auxiliary_width: int = 0
    classes: int = 0


def recognise(arrays: Mapping[str, Any], backbone_only: bool = False) -> Layout | None:
    """What the names and a few shapes say; None: there is no block of a ResNet.

    Args:
      arrays: by the names of the file.
      backbone_only: leave a head out, whatever it is.
    """
    prefix = "backbone." if any(name.startswith("backbone.") for name in arrays) else ""
    names = {name.removeprefix(prefix): np.shape(array) for name, array in arrays.items() if name.startswith(prefix)}
    blocks = [max((int(i) for name in names for i in re.findall(rf"^layer{n}\.(\d+)\.", name)), default=-1) + 1
              for n in (1, 2, 3, 4)]  # fmt: skip
    if not any(blocks):
        return None
    deep = any(re.fullmatch(r"layer\d\.\d+\.conv3\.weight", name) for name in names)
    alike = {name: make().depth for name, make in RESNETS.items() if (make().block is Bottleneck) == deep}
    backbone = min(alike, key=lambda name: sum(abs(n - m) for n, m in zip(blocks, alike[name], strict=True)))

    def fits(stem: Table) -> int:
        return sum(1 if f"{theirs}.weight" in names else -1 for _, theirs in stem)

    stem_table = max(STEMS.values(), key=fits)
    stem = "v1"
    if len(stem_table) > 2:
        first = (names.get(f"{stem_table[0][1]}.weight") or (0,))[0]
        stem = "v1s" if first == 64 else "v1c"
    in_model = prefix and any(name.startswith("classifier.") for name in arrays) and not backbone_only
    table = tuple(
        (rf"backbone/{ours}" if in_model else ours, prefix + theirs) for ours, theirs in (*stem_table, *BLOCKS)
    )
    if not in_model:
        return Layout(backbone, stem, None, False, table, prefix)
    head = "aspp" if any(name.startswith("classifier.0.convs.") for name in arrays) else "fcn"
    auxiliary = any(name.startswith("aux_classifier.") for name in arrays)

    def outputs(name: str, default: int) -> int:
        return (np.shape(arrays[name]) or (default,))[0] if name in arrays else default

    width = outputs("classifier.1.weight", 256)  # DeepLab's 3x3 convolution, FCN's normalisation.
    return Layout(
        backbone,
        stem,
        head,
        auxiliary,
        (*table, *HEADS[head], *(AUXILIARY if auxiliary else ())),
        prefix,
        width,
        outputs("aux_classifier.0.weight", 256) if auxiliary else 0,
        outputs("classifier.4.weight", 21),
    )


@dataclass
class Conversion:
    """What became of a file's arrays.

    Attributes:
      variables: as ours; of no use if there are faults.
      faults: a line for each array that is missing, unknown, or of another shape or kind.
      left_out: names of arrays that no network of ours has.
      cast: how many arrays were stored in which other type than float32.
    """

    variables: dict[str, Any]
    faults: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    cast: Counter[str] = field(default_factory=Counter)


def is_left_out(name: str) -> bool:
    """Whether an array of torchvision's is one that no network here has."""
    return re.fullmatch(LEFT_OUT, name) is not None


def convert(
    arrays: Mapping[str, np.ndarray], shapes: Any, table: Table, may_be_left_out: Callable[[str], bool] = is_left_out
) -> Conversion:
    """A network's variables from the arrays of a PyTorch module, every fault noted.

    Kernels [O, I, h, w] become [h, w, I, O]. Running variances are taken as they are: PyTorch's are unbiased, as an
    evaluation wants them; only in training do the two count them differently.

    Args:
      arrays: by name.
      shapes: params and batch_stats wanted, as from `jax.eval_shape`.
      table: what our modules are called there.
      may_be_left_out: whether an array of that name may be there for nothing.
    """
    result, used = Conversion({}), set()

    def take(path: tuple, wanted: jax.ShapeDtypeStruct) -> np.ndarray | None:
        *modules, leaf = (key.key for key in path[1:])
        name = f"{_theirs('/'.join(modules), table)}.{LEAVES[leaf]}"
        used.add(name)
        if name not in arrays:
            result.faults.append(f"{name}: missing")
            return None
        array = arrays[name]
        kernel = wanted.ndim == 4
        expected = tuple(wanted.shape[i] for i in (3, 2, 0, 1)) if kernel else wanted.shape
        if array.shape != expected:
            result.faults.append(f"{name}: shape {array.shape}, {expected} wanted")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            result.faults.append(f"{name}: {array.dtype}, floating-point numbers wanted")
        else:
            if array.dtype != np.float32:
                result.cast[str(array.dtype)] += 1
            with np.errstate(over="ignore"):  # Told as not finite.
                # A copy: what is mapped from the file can be let go.
                taken = np.array(array.transpose(2, 3, 1, 0) if kernel else array, np.float32, order="C")
            if not np.isfinite(taken).all():
                result.faults.append(f"{name}: holds values that are not finite")
            elif leaf == "var" and taken.min() < 0:
                result.faults.append(f"{name}: holds negative variances")
            return taken
        return None

    result.variables = jax.tree_util.tree_map_with_path(take, shapes)
    unused = [name for name in arrays if name not in used]
    result.left_out = [name for name in unused if may_be_left_out(name)]
    result.faults += [f"{name}: unknown" for name in unused if name not in result.left_out]
    return result


def _theirs(module: str, table: Table) -> str:
    for pattern, theirs in table:
        if match := re.fullmatch(pattern, module):
            return match.expand(theirs)
    raise KeyError(f"{module}: not in the table")
