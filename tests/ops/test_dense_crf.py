"""The dense CRF against its definition, against pydensecrf's output, and on what it must leave alone."""

import importlib
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weakseg.ops.dense_crf import dense_crf, dense_crf_from_labels, dense_crf_many

module = importlib.import_module("weakseg.ops.dense_crf")  # the name in ops is the function


def _scene(height: int, width: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Coloured blobs with some noise, and blurred, wrong-in-places probabilities of them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    centres = rng.random((classes, 2)) * (height, width)
    nearest = np.hypot(y - centres[:, 0, None, None], x - centres[:, 1, None, None]).argmin(0)
    colours = rng.integers(0, 256, (classes, 3))
    image = (colours[nearest] + rng.normal(0, 8, (height, width, 3))).clip(0, 255)
    scores = rng.random((classes, height, width)) + 0.4 * np.eye(classes)[nearest].transpose(
        2, 0, 1
    )
    image = torch.from_numpy(image.astype(np.uint8)).permute(2, 0, 1)[None]
    return image, torch.from_numpy(scores / scores.sum(0))[None].float()


def _exact(image: torch.Tensor, unary: np.ndarray, iterations: int, gaussian, bilateral):
    """The definition in float64: all pairs of pixels, (K, N) energies, kernels of full matrices."""
    height, width = image.shape[-2:]
    place = np.indices((height, width)).reshape(2, -1).T
    colour = image.reshape(3, -1).numpy().T.astype(np.float64)
    joint = np.concatenate([place / bilateral[0], colour / bilateral[1]], 1)
    pairwise = 0
    for features, weight in ((place / gaussian[0], gaussian[1]), (joint, bilateral[2])):
        kernel = np.exp(-0.5 * ((features[:, None] - features) ** 2).sum(-1))
        norm = 1 / np.sqrt(kernel.sum(1))
        pairwise = pairwise + weight * norm[:, None] * kernel * norm

    def normalised(energy):
        q = np.exp(energy - energy.max(0))
        return q / q.sum(0)

    q = normalised(-unary)
    for _ in range(iterations):
        q = normalised(-unary + q @ pairwise)
    return q


def _differences(found: torch.Tensor, expected: np.ndarray) -> tuple[float, float]:
    """Share of pixels with another label, and mean absolute difference."""
    found = found[0].flatten(1).numpy()
    return (found.argmax(0) != expected.argmax(0)).mean(), np.abs(found - expected).mean()


KERNELS = {
    "soft": ((3, 3), (80, 13, 10)),
    "label": ((3, 3), (50, 5, 10)),
    "deeplab": ((1, 3), (67, 3, 4)),
}


@pytest.mark.parametrize("preset", KERNELS)
@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_it_is_the_mean_field_of_the_definition(preset, iterations):
    image, probabilities = _scene(20, 24, 5)
    unary = -np.log(probabilities[0].flatten(1).double().numpy())
    expected = _exact(image, unary, iterations, *KERNELS[preset])
    found = dense_crf(image, probabilities, iterations, preset=preset)
    assert torch.equal(found, dense_crf(image, probabilities, iterations, *KERNELS[preset]))
    if iterations == 0:
        np.testing.assert_allclose(found[0].flatten(1), expected, atol=1e-6)
        return
    other, mean = _differences(found, expected)
    assert other <= 0.03 and mean < 0.01  # the lattice's kernels are Gaussians to a few per cent
    assert _differences(probabilities, expected)[1] > 0.05  # there is much to do


def test_labels_are_the_mean_field_of_their_unary():
    image, probabilities = _scene(20, 24, 3)
    labels = torch.tensor([4, 0, 2])[probabilities.argmax(1)]  # 1, 3, 5 and 6 occur nowhere
    labels[0, :4, :4] = 255
    ids = labels[0].flatten().numpy()
    unary = np.full((7, ids.size), -np.log(0.25 / 6))
    for k in range(7):
        unary[k, ids == k] = -np.log(0.75)
    unary[:, ids == 255] = -np.log(1 / 7)
    for iterations in (0, 2):
        found = dense_crf_from_labels(image, labels, 7, 0.75, iterations, preset="soft")
        expected = _exact(image, unary, iterations, *KERNELS["soft"])
        other, mean = _differences(found, expected)
        assert mean < (0.01 if iterations else 1e-6)
        assert iterations == 0 or other < 0.02
        torch.testing.assert_close(found.sum(1), torch.ones(1, 20, 24))
    assert torch.equal(
        dense_crf_from_labels(image, labels, 7),
        dense_crf_from_labels(image, labels, 7, 0.7, 10, *KERNELS["label"]),
    )


@pytest.mark.realdata
@pytest.mark.parametrize("number", [0, 1, 2])
def test_it_agrees_with_pydensecrf(oracle, number):
    arrays = oracle(f"dense_crf_{number}")
    image = torch.from_numpy(arrays["image"]).permute(2, 0, 1)[None]
    probabilities = torch.from_numpy(arrays["probabilities"])[None]
    names = {"soft", "label", "deeplab"} & set(arrays)
    assert names
    for name in names:
        iterations, near, weight, far, colour, far_weight = map(int, arrays[f"{name}_params"])
        kernels = (near, weight), (far, colour, far_weight)
        if name == "label":
            labels = torch.from_numpy(arrays["labels"])[None]
            trust = float(arrays["gt_prob"])
            classes = probabilities.shape[1]
            found = dense_crf_from_labels(image, labels, classes, trust, iterations, *kernels)
        else:
            found = dense_crf(image, probabilities, iterations, *kernels)
        expected = arrays[name].astype(np.float32).reshape(probabilities.shape[1], -1)
        other, mean = _differences(found, expected)
        assert other < 1e-3 and mean < 1e-3, name


@pytest.mark.parametrize("classes", [2, 4, 5, 9])
def test_the_order_of_classes_does_not_matter(classes):
    image, probabilities = _scene(16, 20, classes)
    order = torch.randperm(classes)
    found = dense_crf(image, probabilities)
    torch.testing.assert_close(found[:, order], dense_crf(image, probabilities[:, order]))
    torch.testing.assert_close(found.sum(1), torch.ones(1, 16, 20))


def test_a_constant_field_remains():
    image = torch.full((1, 3, 12, 15), 90, dtype=torch.uint8)
    probabilities = torch.tensor([0.5, 0.5, 0.5]).reshape(1, 3, 1, 1).expand(1, 3, 12, 15)
    found = dense_crf(image, probabilities)
    torch.testing.assert_close(found, torch.full((1, 3, 12, 15), 1 / 3))
    leaning = dense_crf(image, probabilities * torch.tensor([1, 0.9, 0.9]).reshape(1, 3, 1, 1))
    assert leaning[:, 0].min() > 0.99  # a majority everywhere wins everywhere


def test_labels_spread_to_the_edge_of_the_colour():
    image = torch.zeros(1, 3, 30, 40, dtype=torch.uint8)
    image[..., 20:] = 200
    probabilities = torch.full((1, 2, 30, 40), 0.5)
    probabilities[:, 0, :, :12], probabilities[:, 1, :, :12] = 0.8, 0.2
    probabilities[:, 0, :, 28:], probabilities[:, 1, :, 28:] = 0.2, 0.8
    found = dense_crf(image, probabilities).argmax(1)[0]
    assert found[:, :20].eq(0).all() and found[:, 20:].eq(1).all()


def test_mirrored_nearly_the_same():
    image, probabilities = _scene(32, 40, 3)
    found = dense_crf(image, probabilities)
    mirrored = dense_crf(image.flip(-1), probabilities.flip(-1)).flip(-1)
    assert (found - mirrored).abs().mean() < 0.01  # the lattice has an orientation
    assert found.argmax(1).eq(mirrored.argmax(1)).float().mean() > 0.99


def test_the_result_is_the_same_bit_for_bit_in_any_number_of_threads(monkeypatch):
    image, probabilities = _scene(61, 83, 5)
    whole = dense_crf(image, probabilities)
    labels = probabilities.argmax(1)
    by_labels = dense_crf_from_labels(image, labels, 6)
    monkeypatch.setattr(module, "_PIXELS_PER_THREAD", 100)
    used = set()
    normalise = module._normalise_exp

    def watched(*args):
        used.add(threading.get_ident())
        normalise(*args)

    monkeypatch.setattr(module, "_normalise_exp", watched)
    for threads in (2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert torch.equal(dense_crf(image, probabilities), whole)
        assert torch.equal(dense_crf_from_labels(image, labels, 6), by_labels)
    assert len(used) > 1


def test_an_image_does_not_depend_on_its_batch():
    first, second = _scene(21, 26, 4, 0), _scene(21, 26, 4, 1)
    image, probabilities = (torch.cat(pair) for pair in zip(first, second, strict=True))
    found = dense_crf(image, probabilities)
    assert torch.equal(found, torch.cat([dense_crf(*first), dense_crf(*second)]))
    labels = probabilities.argmax(1)
    one_by_one = [dense_crf_from_labels(image[b : b + 1], labels[b : b + 1], 4) for b in (0, 1)]
    assert torch.equal(dense_crf_from_labels(image, labels, 4), torch.cat(one_by_one))


@pytest.mark.parametrize("threads", [1, 3])
def test_many_of_different_sizes_come_in_order(threads):
    scenes = [_scene(10 + 3 * i, 30 - 2 * i, 2 + i % 3, i) for i in range(9)]
    found = list(dense_crf_many(iter(scenes), 3, preset="label", threads=threads))
    assert len(found) == 9
    for one, scene in zip(found, scenes, strict=True):
        assert torch.equal(one, dense_crf(*scene, 3, preset="label"))


def test_many_reads_only_a_little_ahead():
    read = []

    def scenes():
        for i in range(20):
            read.append(i)
            yield _scene(6, 6, 2)

    results = dense_crf_many(scenes(), 1, threads=1)
    next(results)
    assert len(read) <= 3
    assert len(list(results)) == 19


def test_classes_without_evidence_get_zeros():
    image, probabilities = _scene(12, 14, 2)
    with_empty = torch.zeros(1, 5, 12, 14)
    with_empty[:, [1, 3]] = probabilities
    with_empty[:, 4] = 1e-6
    found = dense_crf(image, with_empty)
    assert torch.equal(found[:, [1, 3]], dense_crf(image, probabilities))
    assert found[:, [0, 2, 4]].eq(0).all()
    unary = -np.log(with_empty[0].flatten(1).double().numpy().clip(1e-5, 1))
    assert _differences(found, _exact(image, unary, 10, *KERNELS["soft"]))[1] < 0.01


def test_one_class_or_none_needs_no_iterations():
    image, probabilities = _scene(5, 6, 3)
    assert dense_crf(image, probabilities[:, :1]).eq(1).all()
    found = dense_crf(image, probabilities * torch.tensor([0, 0.1, 0]).reshape(1, 3, 1, 1))
    assert found[:, 1].eq(1).all() and found[:, [0, 2]].eq(0).all()
    torch.testing.assert_close(dense_crf(image, 0 * probabilities), torch.full((1, 3, 5, 6), 1 / 3))
    assert dense_crf(image, probabilities[:, :0]).shape == (1, 0, 5, 6)
    assert dense_crf(image[:0], probabilities[:0]).shape == (0, 3, 5, 6)

    labels = torch.full((1, 5, 6), 2)
    labels[0, 0] = 255
    assert torch.equal(
        dense_crf_from_labels(image, labels, 3)[0, :, 0, 0], torch.tensor([0.0, 0, 1])
    )
    assert dense_crf_from_labels(image, 0 * labels, 1).eq(1).all()
    unsure = dense_crf_from_labels(image, torch.full_like(labels, 255), 3)
    torch.testing.assert_close(unsure, torch.full((1, 3, 5, 6), 1 / 3))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1)])
def test_tiny_images(height, width):
    image, probabilities = _scene(height, width, 3)
    unary = -np.log(probabilities[0].flatten(1).double().numpy())
    found = dense_crf(image, probabilities, 2)
    assert _differences(found, _exact(image, unary, 2, *KERNELS["soft"]))[1] < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_refined_in_float32(dtype):
    image, probabilities = _scene(12, 14, 3)
    probabilities = probabilities.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dense_crf(image, probabilities)
    assert found.dtype == torch.float32
    assert torch.equal(found, dense_crf(image, probabilities.float()))


def test_inputs_may_be_non_contiguous_and_stay_as_they_are():
    image, probabilities = _scene(12, 14, 3)
    wide = image.repeat_interleave(2, -1)[..., ::2]
    last = probabilities.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).requires_grad_()
    before = image.clone(), probabilities.clone()
    found = dense_crf(wide, last)
    assert torch.equal(found, dense_crf(image, probabilities)) and not found.requires_grad
    labels = probabilities.argmax(1)
    turned = labels.mT.contiguous().mT
    assert torch.equal(
        dense_crf_from_labels(wide, turned, 3), dense_crf_from_labels(image, labels, 3)
    )
    assert torch.equal(image, before[0]) and torch.equal(probabilities, before[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype):
    image, probabilities = _scene(10, 11, 3)
    labels = probabilities.argmax(1)
    labels[0, 3] = 255
    assert torch.equal(
        dense_crf_from_labels(image, labels.to(dtype), 3), dense_crf_from_labels(image, labels, 3)
    )
    other = labels.where(labels != 255, -1)
    assert torch.equal(
        dense_crf_from_labels(image, other, 3, ignore=-1), dense_crf_from_labels(image, labels, 3)
    )


def test_probabilities_are_resized_to_the_image():
    image, probabilities = _scene(20, 24, 3)
    small = probabilities[..., ::2, ::3]
    enlarged = torch.nn.functional.interpolate(small, (20, 24), mode="bilinear")
    assert torch.equal(dense_crf(image, small), dense_crf(image, enlarged))


def test_a_kernel_of_weight_zero_is_left_out():
    image, probabilities = _scene(12, 14, 3)
    without = dense_crf(image, probabilities, 5, (3, 0), (80, 13, 0))
    torch.testing.assert_close(without, probabilities)
    place_only = dense_crf(image, probabilities, 5, (3, 3), (80, 13, 0))
    assert torch.equal(place_only, dense_crf(255 - image, probabilities, 5, (3, 3), (9, 9, 0)))


def test_a_preset_scales_with_the_image():
    image, probabilities = _scene(25, 50, 3)
    found = dense_crf(image, probabilities, preset="soft", scale="auto")
    assert torch.equal(found, dense_crf(image, probabilities, 10, (3 * 0.1, 3), (80 * 0.1, 13, 10)))
    assert torch.equal(found, dense_crf(image, probabilities, scale=0.1))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 6),
    st.floats(0.5, 100),
    st.floats(0.5, 100),
    st.integers(0, 2**32 - 1),
)
def test_whatever_comes_in_distributions_come_out(height, width, classes, place, colour, seed):
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.integers(0, 256, (1, 3, height, width), dtype=np.uint8))
    probabilities = torch.from_numpy(rng.random((1, classes, height, width)) ** 8)
    found = dense_crf(image, probabilities, 3, (place, 3), (place, colour, 10))
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(1), torch.ones(1, height, width))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 2, "gaussian": (3, 3)}, "scale is for presets"),
        ({"scale": "auto", "bilateral": (80, 13, 10)}, "scale is for presets"),
        ({"scale": 0}, "positive number"),
        ({"scale": "half"}, "positive number"),
        ({"preset": "hard"}, "soft, label, deeplab"),
        ({"gaussian": (0, 3)}, "gaussian must be"),
        ({"gaussian": (3, 3, 3)}, "gaussian must be"),
        ({"bilateral": (80, 13, -1)}, "bilateral must be"),
        ({"bilateral": (80, float("nan"), 1)}, "bilateral must be"),
        ({"bilateral": (1e-6, 1e-6, 1)}, "too narrow"),
        ({"iterations": -1}, "negative"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    image, probabilities = _scene(8, 8, 2)
    with pytest.raises(ValueError, match=message):
        dense_crf(image, probabilities, **settings)
    with pytest.raises(ValueError, match=message):
        dense_crf_from_labels(image, probabilities.argmax(1), 2, **settings)
    with pytest.raises(ValueError, match=message):
        list(dense_crf_many([(image, probabilities)], **settings))


def test_wrong_inputs_are_refused():
    image, probabilities = _scene(8, 8, 2)
    with pytest.raises(TypeError, match="uint8"):
        dense_crf(image.float(), probabilities)
    with pytest.raises(ValueError, match=r"image\[None\]"):
        dense_crf(image[0], probabilities)
    with pytest.raises(TypeError, match="float"):
        dense_crf(image, probabilities.argmax(1, keepdim=True))
    with pytest.raises(ValueError, match="as many of each"):
        dense_crf(image, probabilities.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="NaN"):
        dense_crf(image, probabilities.clone().index_fill_(3, torch.tensor([2]), torch.nan))


def test_wrong_labels_are_refused():
    image, probabilities = _scene(8, 8, 2)
    labels = probabilities.argmax(1)
    with pytest.raises(TypeError, match="integer"):
        dense_crf_from_labels(image, labels.float(), 2)
    with pytest.raises(TypeError, match="integer"):
        dense_crf_from_labels(image, labels.bool(), 2)
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        dense_crf_from_labels(image, labels.numpy(), 2)
    with pytest.raises(ValueError, match="resize"):
        dense_crf_from_labels(image, labels[:, :4], 2)
    with pytest.raises(ValueError, match=r"labels\[None\]"):
        dense_crf_from_labels(image, labels[0], 2)
    with pytest.raises(ValueError, match="labels hold 5"):
        dense_crf_from_labels(image, labels.where(labels == 0, 5), 2)
    with pytest.raises(ValueError, match="num_classes"):
        dense_crf_from_labels(image, labels, 0)
    with pytest.raises(ValueError, match="ignore=1"):
        dense_crf_from_labels(image, labels, 2, ignore=1)
    for trust in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="gt_prob"):
            dense_crf_from_labels(image, labels, 2, trust)
