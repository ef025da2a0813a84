"""Train the example's network on Fashion-MNIST and write what ships beside this file.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb raw
    python train.py --images raw/usr/share/datasets/fashion-mnist

writes `fashion.safetensors` (weights) and `fashion.npz` (a subset: 12,000 training, 2,000 validation and 2,000 test
images). It takes about 13 minutes on two cores that have bf16 instructions. The 2,000 validation images are carved
from the 60,000 training images before training and never trained on, so a search that looks at them is not flattered
by memory. No choice was made on the test images; they are read once, for the printed accuracy.

The same seed, threads and CPU give the same weights.
"""

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from model import fashion_net
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, pixels scaled to [0, 1]
SEED = 20240
BATCH = 128
PEAK_RATE = 0.15
WEIGHT_DECAY = 5e-4
SHIFT = 2  # pixels, of the random crop


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the array in a gzipped IDX file of unsigned bytes: magic 0, 0, 8, rank; big-endian sizes; data."""
    raw = gzip.decompress(path.read_bytes())
    assert raw[:3] == b"\x00\x00\x08", f"{path} is not an IDX file of bytes"
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(tuple(int(each) for each in shape)).copy()


def pick(labels: NDArray[np.uint8], per_class: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the indices of `per_class` random images of every class, ascending."""
    chosen = [rng.permutation(np.flatnonzero(labels == each))[:per_class] for each in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def normalised(images: NDArray[np.uint8]) -> Tensor:
    """Return N x 1 x 28 x 28 floats."""
    return ((torch.from_numpy(images).unsqueeze(1).float() / 255) - MEAN) / STD


def augmented(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Return the batch with each image mirrored or not and shifted by up to `SHIFT` pixels."""
    count, _, height, width = batch.shape
    padded = nn.functional.pad(batch, [SHIFT] * 4, value=-MEAN / STD)
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)
    mirror = torch.rand(count, 1, generator=generator) < 0.5
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    columns = torch.where(mirror, columns.flip(1), columns)
    return padded[torch.arange(count).view(-1, 1, 1), 0, rows.unsqueeze(2), columns.unsqueeze(1)].unsqueeze(1)


def batches(images: Tensor, labels: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one shuffled, augmented epoch; the last incomplete batch is left out."""
    order = torch.randperm(len(images), generator=generator)
    for chosen in order.split(BATCH):
        if len(chosen) == BATCH:
            yield augmented(images[chosen], generator), labels[chosen]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 in float32."""
    model.eval()
    return float(torch.cat([model(each).argmax(1) for each in images.split(500)]).eq(labels).float().mean())


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train in place: SGD, one cycle of the learning rate, bf16 products and float32 weights."""
    generator = torch.Generator().manual_seed(SEED)
    steps = epochs * (len(images) // BATCH)
    optimiser = torch.optim.SGD(model.parameters(), PEAK_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=steps, cycle_momentum=False)
    started = time.monotonic()
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for inputs, wanted in batches(images, labels, generator):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(inputs.contiguous(memory_format=torch.channels_last)), wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        print(
            f"epoch {epoch + 1}/{epochs}  loss {total * epochs / steps:.4f}  {time.monotonic() - started:.0f} s",
            flush=True,
        )


def main() -> None:
    """Carve, train, write, and print one JSON line with the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of the four .gz files")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)

    images, labels = (read_idx(options.images / f"train-{each}-ubyte.gz") for each in ("images-idx3", "labels-idx1"))
    test, test_labels = (read_idx(options.images / f"t10k-{each}-ubyte.gz") for each in ("images-idx3", "labels-idx1"))
    held = pick(labels, 200, rng)
    rest = np.setdiff1d(np.arange(len(labels)), held)
    shipped, shipped_test = rest[pick(labels[rest], 1200, rng)], pick(test_labels, 200, rng)
    np.savez_compressed(
        options.out / "fashion.npz",
        train_images=images[shipped],
        train_labels=labels[shipped],
        validation_images=images[held],
        validation_labels=labels[held],
        test_images=test[shipped_test],
        test_labels=test_labels[shipped_test],
    )

    model = fashion_net().to(memory_format=torch.channels_last)
    train(model, normalised(images[rest]), torch.from_numpy(labels[rest]).long(), options.epochs)
    weights = {name: each.detach().contiguous() for name, each in model.state_dict().items()}
    save_file(weights, options.out / "fashion.safetensors")
    scores = {
        name: round(accuracy(model, normalised(pixels), torch.from_numpy(wanted).long()), 4)
        for name, pixels, wanted in (
            ("validation", images[held], labels[held]),
            ("test", test, test_labels),
            ("test_subset", test[shipped_test], test_labels[shipped_test]),
        )
    }
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
