"""Options: every check, and the text of --net_args."""

import subprocess
import sys

import pytest

from cli import parse_assignments
from errors import UserError
from network import registry
from network.config import CascadeConfig


def test_defaults_are_the_originals():
    config = CascadeConfig()
    assert (config.base_network, config.n_cascades, config.rep, config.image_size) == ("VTN", 1, 1, (128,) * 3)
    assert (config.det_factor, config.ortho_factor, config.reg_factor) == (0.1, 0.1, 1.0)
    assert (config.warp_gradient, config.warp_padding, config.augmentation) == (True, False, None)
    assert config.similarity == "ncc"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("base_network", "UNet"),
        ("n_cascades", -1),
        ("n_cascades", 1.0),
        ("n_cascades", True),
        ("rep", 0),
        ("image_size", (128, 128)),
        ("image_size", 5),
        ("image_size", (128, 128, 0)),
        ("reg_factor", -0.1),
        ("det_factor", float("nan")),
        ("leaky_slope", "0.1"),
        ("warp_padding", 1),
        ("channels", 0),
        ("augmentation", "none"),
        ("similarity", "ssd"),
        ("similarity_on", "first"),
        ("similarity_mask", "outside"),
        ("bending_factor", -1),
        ("inverse_factor", "1"),
        ("flow", "speed"),
    ],
)
def test_a_wrong_option_names_itself_its_value_and_what_is_allowed(option, value):
    with pytest.raises(UserError, match=option) as error:
        CascadeConfig(**{option: value})
    assert repr(value) in str(error.value)
    assert "must be" in str(error.value)


def test_stages_of_repeated_cascades():
    config = CascadeConfig(n_cascades=2, rep=3)
    assert config.last_stage == 6
    assert config.similarity_stages == [4, 5, 6]
    assert config.replace(similarity_on="all").similarity_stages == [0, 1, 2, 3, 4, 5, 6]
    assert config.flow_multiplier == 0.5
    affine_alone = CascadeConfig(n_cascades=0)
    assert affine_alone.last_stage == 0
    assert affine_alone.similarity_stages == [0]


def test_net_args():
    config = CascadeConfig().with_net_args("reg_factor=0.5, augmentation='identity',warp_padding=True")
    assert (config.reg_factor, config.augmentation, config.warp_padding) == (0.5, "identity", True)
    assert CascadeConfig().with_net_args("") == CascadeConfig().with_net_args(None) == CascadeConfig()


def test_a_config_from_before_the_similarity_could_be_chosen_means_ncc():
    values = CascadeConfig().to_dict()
    del values["similarity"]
    assert CascadeConfig.from_dict(values, "here").similarity == "ncc"
    assert CascadeConfig().with_net_args("similarity='mi'").similarity == "mi"


def test_an_unknown_key_lists_the_allowed_ones():
    with pytest.raises(UserError, match=r"--net_args: unknown key 'regfactor'; allowed are det_factor, .*augmentation"):
        CascadeConfig().with_net_args("regfactor=1")


@pytest.mark.parametrize(
    "text",
    [
        "reg_factor",
        "reg_factor=",
        "1, 2",
        "a=1, a=2",
        "a=__import__('os')",
        "a=b",
        "a=1)",
        "**{'a': 1}",
        "a=1; b=2",
        "a=1+x",
    ],
)
def test_text_that_is_not_assignments_is_refused_and_never_run(text):
    with pytest.raises(UserError, match="--x"):
        parse_assignments(text, ("a", "reg_factor"), "--x")


def test_config_goes_through_json():
    config = CascadeConfig("VoxelMorph", 3, 2, (10, 20, 30), channels=4)
    assert CascadeConfig.from_dict(config.to_dict(), "here") == config
    with pytest.raises(UserError, match=r"here: unknown option 'colour'; known are base_network"):
        CascadeConfig.from_dict({"colour": 1}, "here")


def test_options_of_a_similarity_are_taken_with_it_alone():
    config = CascadeConfig().with_net_args("similarity='lncc', window=5, channels=8")
    assert config.options == {"channels": 8, "leaky_slope": 0.1, "window": 5}
    assert (config.base_network_options, config.similarity_options) == (
        {"channels": 8, "leaky_slope": 0.1},
        {"window": 5},
    )
    assert hash(config) == hash(CascadeConfig.from_dict(config.to_dict(), "here"))
    assert config.replace(similarity="mind").options == {"channels": 8, "leaky_slope": 0.1, "radius": 1, "dilation": 2}
    with pytest.raises(UserError, match=r"window is 4; it must be an odd whole number from 3"):
        config.replace(window=4)
    with pytest.raises(UserError, match=r"--net_args: unknown key 'window'"):
        CascadeConfig().with_net_args("window=5")


def test_a_sum_of_similarities_takes_the_options_of_each():
    config = CascadeConfig().with_net_args("similarity='lncc + 0.5*mi', window=5, bins=16, similarity_on='all'")
    assert registry.similarity_terms(config.similarity) == ((1.0, "lncc"), (0.5, "mi"))
    assert config.similarity_options == {"window": 5, "bins": 16, "sampling": 1}
    assert CascadeConfig().with_net_args(config.net_args) == config
    assert config.replace(similarity="2*mi").similarity_options == {"bins": 16, "sampling": 1}


@pytest.mark.parametrize(
    ("similarity", "message"),
    [
        ("ncc+", "similarity is ''; it must be one of ncc"),
        ("ncc+0.5*ssd", "similarity is 'ssd'; it must be one of ncc"),
        ("ncc+0*mi", r"'ncc\+0\*mi'; it must be a name, or a sum of several with weights above 0"),
        ("-1*ncc", "a sum of several with weights above 0"),
        ("nan*ncc", "a sum of several with weights above 0"),
        ("half*ncc", "a sum of several with weights above 0"),
        ("ncc+2*ncc", "a sum of several with weights above 0"),
        (["ncc"], r"similarity is \['ncc'\]; it must be one of ncc"),
    ],
)
def test_a_sum_that_is_none(similarity, message):
    with pytest.raises(UserError, match=message):
        CascadeConfig(similarity=similarity)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "channels=4",
        "similarity='ncc+0.5*mind', radius=2",
        "similarity='lncc'",
        "reg_factor=2.0, similarity='lncc', window=5",
    ],
)
def test_net_args_in_force_are_the_text_that_makes_them(text):
    config = CascadeConfig().with_net_args(text)
    assert config.net_args == text
    assert CascadeConfig().with_net_args(config.net_args) == config


def test_an_option_that_is_not_one():
    with pytest.raises(AttributeError, match="no option 'colour'"):
        CascadeConfig().colour  # noqa: B018
    with pytest.raises(UserError, match=r"augmentation is 'none'; it must be one of None, identity, or some of bspl"):
        CascadeConfig(augmentation="none")


def test_tables_refuse_a_name_twice_and_an_option_that_means_something_else(monkeypatch):
    with pytest.raises(UserError, match="base_network 'VTN' is registered already"):
        registry.BASE_NETWORKS["VTN"] = registry.Extension("a:b")
    for option in ("rep", "leaky_slope"):
        rows = {"mine": registry.Extension("a:b", {option: registry.number(1)})}
        for module in ("config", "registry"):
            monkeypatch.setattr(f"network.{module}.SIMILARITIES", registry.Table("similarity", rows))
        with pytest.raises(UserError, match=f"'mine' declares the option '{option}', a name that is taken"):
            CascadeConfig(similarity="mine")


@pytest.mark.parametrize(
    "before",
    [
        "import os; os.environ['KERAS_BACKEND'] = 'jax'",
        "import sys, types; made = types.SimpleNamespace; "
        "sys.modules['keras'] = made(config=made(backend=lambda: 'jax'))",
    ],
    ids=["asked for", "imported before"],
)
def test_another_backend_of_keras_is_refused_not_overwritten(before):
    done = subprocess.run([sys.executable, "-c", f"{before}; import network"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "KERAS_BACKEND is 'jax', but the networks need Keras on TensorFlow; unset it" in done.stderr
