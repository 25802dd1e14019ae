import pytest
import torch
from torch import nn

from cleave.architectures.inserts.coders import build_bottleneck


def run(source, target, layout, **settings):
    built = build_bottleneck(source, target, layout, **settings)
    z = built.encoder(torch.randn(2, *source))
    return built, tuple(z.shape[1:]), tuple(built.decoder(z).shape[1:])


@pytest.mark.parametrize(
    ("source", "target", "settings", "shape"),
    [
        ((3, 32, 32), (32, 16, 16), {}, (8, 16, 16)),
        ((3, 32, 32), (32, 16, 16), {"stride": 4, "channels": 12}, (12, 8, 8)),
        ((3, 32, 32), (64, 8, 8), {"stride": 2}, (8, 16, 16)),
        ((1, 8, 8), (32, 4, 4), {"channels": 4, "kernel": 5}, (4, 4, 4)),
        ((3, 224, 224), (512, 28, 28), {"stride": 14}, (8, 16, 16)),
        ((3, 33, 47), (16, 9, 12), {"depth": 0}, (8, 9, 12)),
        ((3, 224, 160), (768, 7, 5), {"stride": 32}, (8, 7, 5)),
    ],
)
def test_fits_any_map_in_place_of_the_head(source, target, settings, shape):
    built, coded, decoded = run(source, target, "NCHW", **settings)
    assert built.shape == coded == shape
    assert decoded == target


@pytest.mark.parametrize("stride", [None, 2, 3])
def test_fits_a_map_behind_the_head(stride):
    built, coded, decoded = run((32, 14, 14), (32, 14, 14), "NCHW", form="insert", stride=stride, channels=6)
    assert coded == built.shape == (6, *{None: (14, 14), 2: (7, 7), 3: (5, 5)}[stride])
    assert decoded == (32, 14, 14)


@pytest.mark.parametrize("form", ["replace", "insert"])
def test_fits_channels_last_maps(form):
    source = (3, 224, 224) if form == "replace" else (28, 30, 96)
    built, coded, decoded = run(source, (28, 30, 96), "NHWC", form=form, channels=5)
    assert coded == built.shape
    assert coded[0] == 5
    assert decoded == (28, 30, 96)


@pytest.mark.parametrize(("layout", "target"), [("NLC", (197, 192)), ("NC", (512,))])
def test_tokens_and_vectors_get_a_linear_layer(layout, target):
    built, coded, decoded = run(target, target, layout, form="insert", channels=16)
    assert isinstance(built.encoder, nn.Linear)
    assert coded == built.shape == (*target[:-1], 16)
    assert decoded == target


def test_building_leaves_no_trace_of_the_probe():
    built = build_bottleneck((3, 32, 32), (32, 16, 16), "NCHW")
    assert built.encoder.training
    assert all(m.num_batches_tracked == 0 for m in built.encoder.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"channels": 0}, "channels must be a whole number of at least"),
        ({"channels": 1.5}, "channels must be a whole number of at least"),
        ({"kernel": 4}, "use 3 or 5"),
        ({"stride": 0}, "stride must be a whole number of at least"),
        ({"stride": 64}, "use at most 32"),
        ({"width": 0}, "width must be a whole number of at least"),
        ({"depth": -1}, "depth must be a whole number of at least"),
        ({"form": "swap"}, "replace, insert"),
    ],
)
def test_bad_arguments_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        build_bottleneck((3, 32, 32), (32, 16, 16), "NCHW", **settings)


def test_what_a_layout_cannot_have_is_refused():
    with pytest.raises(ValueError, match="form=insert"):
        build_bottleneck((3, 224, 224), (197, 192), "NLC")
    with pytest.raises(ValueError, match="stride=2 has no meaning"):
        build_bottleneck((197, 192), (197, 192), "NLC", form="insert", stride=2)
    with pytest.raises(ValueError, match="'other'"):
        build_bottleneck((3, 4, 5, 6, 7), (3, 4, 5, 6, 7), "other", form="insert")
