"""What is known about each data set of images before it is loaded."""

from typing import NamedTuple


class Kind(NamedTuple):
    """Shape, classes and augmentation of images; mean and deviation are per channel, of pixels in [0, 1]."""

    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool


KINDS = {
    "digits": Kind((8, 8, 1), 10, (0.3054,), (0.3760,), pad=1, flip=False),
    "cifar10": Kind((32, 32, 3), 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), pad=4, flip=True),
    "imagenet2012": Kind((224, 224, 3), 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), pad=0, flip=False),
    "cifar100": Kind((32, 32, 3), 100, (0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615), pad=4, flip=True),
}
