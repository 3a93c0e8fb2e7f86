"""Freezes what PyTorch and torchvision compute, for the tests that compare this project with them.

    python scripts/make_torch_fixtures.py

needs torch, torchvision and numpy, nothing of this project, and writes tests/{ops,models,weights}/*.npz anew. The tests
then need no torch; where it is installed they call the functions below as well, with another seed. PyTorch is
imported inside them because the tests always need `resnet_parameter`.
"""

import zlib
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1] / "tests"
Arrays = dict[str, np.ndarray]


def deform_conv2d(seed: int) -> Arrays:
    """Outputs and gradients of torchvision.ops.deform_conv2d in float64; names are `case/array`, layouts are torch's.

    Offsets reach several cells beyond the map. In the cases `integer` they are whole numbers, as when training starts;
    in those of `all kinds` each is zero, whole, whole and a half, anything, or anything and mostly far outside.
    """
    import torch
    import torchvision

    rng = np.random.default_rng(seed)
    arrays = {}
    for side, points in ((3, "between"), (3, "integer"), (3, "all kinds"), (1, "all kinds"), (5, "all kinds")):
        for masked in (False, True):
            offset = rng.uniform(-4, 4, (2, 2 * side**2, 4, 5))
            whole = np.round(offset)
            if points == "integer":
                offset = whole
            elif points == "all kinds":
                offset = rng.permuted(np.stack([0 * whole, whole, whole + 0.5, offset, 20 * offset]), axis=0)[0]
            inputs = {
                "input": rng.standard_normal((2, 3, 4, 5)),
                "offset": offset,
                "weight": rng.standard_normal((2, 3, side, side)),
            }
            if masked:
                inputs["mask"] = rng.uniform(0, 2, (2, side**2, 4, 5))
            cotangent = rng.standard_normal((2, 2, 4, 5))
            tensors = {name: torch.tensor(array, requires_grad=True) for name, array in inputs.items()}
            output = torchvision.ops.deform_conv2d(**tensors, padding=side // 2)
            output.backward(torch.tensor(cotangent))
            results = {"output": output.detach().numpy(), "cotangent": cotangent}
            gradients = {f"{name}_gradient": tensor.grad.numpy() for name, tensor in tensors.items()}
            case = f"{side} x {side}, {points}, {'with' if masked else 'without'} mask"
            arrays |= {f"{case}/{name}": array for name, array in (inputs | results | gradients).items()}
    return arrays


def interpolate(seed: int) -> Arrays:
    """Bilinear torch.nn.functional.interpolate in float64, `sizes/input` and `sizes/output`, [1, 2, H, W]."""
    import torch

    rng = np.random.default_rng(seed)
    arrays = {}
    pairs = [((5, 7), (5, 7)), ((5, 7), (10, 21)), ((5, 7), (13, 8)), ((8, 6), (4, 3)), ((9, 11), (4, 5))]
    for size_in, size_out in [*pairs, ((9, 5), (1, 20)), ((1, 1), (3, 2)), ((3, 2), (1, 1))]:
        x = rng.standard_normal((1, 2, *size_in))
        y = torch.nn.functional.interpolate(torch.tensor(x), size_out, mode="bilinear", align_corners=False)
        arrays |= {f"{size_in} to {size_out}/input": x, f"{size_in} to {size_out}/output": y.numpy()}
    return arrays


def adaptive_avg_pool2d(seed: int) -> Arrays:
    """torch.nn.functional.adaptive_avg_pool2d in float64, `size to bins/input` and `/output`, [1, 2, H, W]."""
    import torch

    rng = np.random.default_rng(seed)
    arrays = {}
    for size in ((12, 6), (7, 11), (5, 3), (1, 9)):
        for bins in (1, 2, 3, 6):
            x = rng.standard_normal((1, 2, *size))
            y = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(x), bins)
            arrays |= {f"{size} to {bins}/input": x, f"{size} to {bins}/output": y.numpy()}
    return arrays


def resnet_parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter or statistic of the networks of `resnet`, from its torchvision name: nothing is stored."""
    values = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    if len(shape) == 4:
        values *= (3 / np.prod(shape[1:])) ** 0.5
    elif name.endswith(("weight", "running_var")):
        values = 1 + values / 2
    return values.astype(np.float32)


def resnet(seed: int) -> Arrays:
    """Features of torchvision's ResNet with parameters by `resnet_parameter`, in evaluation.

    Names are `block, output stride, size/array`: `image` [1, 3, H, W] and `stage2` to `stage5`, every 37th channel.
    torchvision cannot dilate basic blocks.
    """
    import torch
    import torchvision

    rng = np.random.default_rng(seed)
    variants = [("Bottleneck", 8), ("Bottleneck", 16), ("BasicBlock", 32)]
    arrays = {}
    for (block, output_stride), size in zip(variants, [(65, 47), (64, 38), (49, 66)], strict=True):
        dilate = [False, output_stride == 8, output_stride < 32]
        network = torchvision.models.ResNet(
            getattr(torchvision.models.resnet, block), [1, 1, 2, 2], replace_stride_with_dilation=dilate
        ).eval()
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.tensor(resnet_parameter(name, tuple(tensor.shape))))
        case = f"{block}, {output_stride}, {size}"
        image = rng.standard_normal((1, 3, *size)).astype(np.float32)
        arrays[f"{case}/image"] = image
        with torch.no_grad():
            x = network.maxpool(network.relu(network.bn1(network.conv1(torch.tensor(image)))))
            for stage in (2, 3, 4, 5):
                x = getattr(network, f"layer{stage - 1}")(x)
                arrays[f"{case}/stage{stage}"] = x[:, ::37].numpy()
    return arrays


def state_dicts(seed: int) -> Arrays:
    """`network/arrays`: a line for each array that torchvision saves of a network, its name and sides, for any seed."""
    import torch
    import torchvision

    arrays = {}
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "fcn_resnet50", "deeplabv3_resnet101"):
        segments = "_" in name
        models = torchvision.models.segmentation if segments else torchvision.models
        options = {"weights": None, "weights_backbone": None, "aux_loss": True} if segments else {}
        with torch.device("meta"):
            state = getattr(models, name)(**options).state_dict()
        lines = [" ".join(map(str, (array, *tensor.shape))) for array, tensor in state.items()]
        arrays[f"{name}/arrays"] = np.array("\n".join(lines))
    return arrays


def torchvision_segmenter(head: str):
    """torchvision's `fcn` or `deeplabv3` with deep supervision on a ResNet of one bottleneck a stage, in evaluation."""
    import torch
    from torchvision.models import resnet, segmentation

    make = segmentation.fcn._fcn_resnet if head == "fcn" else segmentation.deeplabv3._deeplabv3_resnet
    dilated = [False, True, True]
    network = make(resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=dilated), 21, True)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.tensor(resnet_parameter(name, tuple(tensor.shape))))
    return network.eval()


def segmenters(seed: int) -> Arrays:
    """Logits of both `torchvision_segmenter`s.

    Names are `head/array`: `arrays` as in `state_dicts`, `image` [1, 3, 48, 40], and of every 7th row and column `out`
    and `aux`, the logits of the classifier and of deep supervision's.
    """
    import torch

    arrays = {}
    for head in ("fcn", "deeplabv3"):
        network = torchvision_segmenter(head)
        image = np.random.default_rng(seed).standard_normal((1, 3, 48, 40)).astype(np.float32)
        lines = [" ".join(map(str, (name, *tensor.shape))) for name, tensor in network.state_dict().items()]
        arrays |= {f"{head}/arrays": np.array("\n".join(lines)), f"{head}/image": image}
        with torch.no_grad():
            outputs = network(torch.tensor(image))
        arrays |= {f"{head}/{name}": logits[..., ::7, ::7].numpy() for name, logits in outputs.items()}
    return arrays


if __name__ == "__main__":
    folders = {resnet: "models", state_dicts: "weights", segmenters: "weights"}
    for make in (deform_conv2d, interpolate, adaptive_avg_pool2d, resnet, state_dicts, segmenters):
        file = TESTS / folders.get(make, "ops") / f"{make.__name__}.npz"
        np.savez_compressed(file, **make(seed=0))
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB")
