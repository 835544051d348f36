"""Every setting, its range, and the configurations that start from the defaults."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fedklpr_jax.config import FIELDS, default_config, flat, resolved, validate
from fedklpr_jax.errors import InputError
from fedklpr_jax.fields import ByTask
from fedklpr_jax.methods import METHODS

pytestmark = pytest.mark.short

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def changed(path, value):
    config = default_config()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({path: value})
    return config


def test_the_defaults_are_valid_fresh_and_complete():
    one, other = default_config(), default_config()
    validate(one)
    one.method.kll.weight = 7.0
    assert other.method.kll.weight == FIELDS["method.kll.weight"].default
    assert flat(other) == {
        path: None if isinstance(field.default, ByTask) else field.default for path, field in FIELDS.items()
    }


@pytest.mark.parametrize("task", ["supervised", "unsupervised"])
def test_settings_left_empty_get_the_value_of_the_task(task):
    config = changed("task.name", task)
    config.optimizer.learning_rate = 0.5
    values = flat(resolved(config))
    assert values["optimizer.learning_rate"] == 0.5 and flat(config)["model.weights"] is None
    for path, field in FIELDS.items():
        if isinstance(field.default, ByTask) and path != "optimizer.learning_rate":
            assert values[path] == getattr(field.default, task), path
    validate(resolved(config))


def test_every_setting_says_what_it_means_and_what_is_right():
    for path, field in FIELDS.items():
        assert field.meaning, path
        free_text = isinstance(field.default, str) and field.default == ""
        assert field.right or free_text or isinstance(field.default, bool), path


@pytest.mark.parametrize("path", [path for path, field in FIELDS.items() if field.right])
def test_every_limited_setting_refuses_what_is_outside(path):
    bad = "no such name/" if FIELDS[path].type is str else FIELDS[path].type(-1)
    with pytest.raises(InputError) as caught:
        validate(changed(path, bad))
    assert str(caught.value) == f"config.{path}: {bad!r} is not allowed; give {FIELDS[path].right}"
    if FIELDS[path].type is float:
        for value in (float("nan"), float("inf")):
            with pytest.raises(InputError, match="is not allowed"):
                validate(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("rounds", True, "config.rounds: True is not allowed; give a int"),
        ("rounds", 2.0, "config.rounds: 2.0 is not allowed; give a int"),
        ("data.flip", "often", "config.data.flip: 'often' is not allowed; give a float"),
        ("eval.rerank", 1, "config.eval.rerank: 1 is not allowed; give a bool"),
        ("name", "a/b", "config.name: 'a/b' is not allowed; give a name without / in it"),
        ("name", "..", "config.name: '..' is not allowed; give a name without / in it"),
        ("participation", 1.5, "config.participation: 1.5 is not allowed; give a share of at most 1"),
        ("data.source", "folder", "config.data.root: empty; the folder source needs the directory that holds the"),
        ("method.nonsense", 1, "config.method.nonsense: there is no such setting"),
        # Numbers that no float holds, or that Python reads from no string.
        ("rounds", 10**400, "config.rounds: 1000"),
        ("data.copies", "9" * 5000, "config.data.copies: '999"),
        ("hosts", f"a:1,{'9' * 5000},0", "config.hosts: 'a:1,999"),
        ("bottom_up.identities", "9" * 400, "config.bottom_up.identities: '999"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(path, value, message):
    with pytest.raises(InputError) as caught:
        validate(changed(path, value))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_missing_setting_is_named_with_its_default():
    config = default_config()
    del config.method.prune.target
    with pytest.raises(InputError, match=r"^config\.method\.prune\.target: missing; its default is "):
        validate(config)


def test_whole_numbers_do_where_a_float_is_wanted():
    validate(changed("data.flip", 1))
    validate(changed("participation", 1))


def test_group_norm_is_for_classification():
    config = changed("model.norm", "group")
    with pytest.raises(InputError, match=r"^config\.model\.norm: 'group' is for classification; give batch"):
        validate(config)
    config.task.name = "classification"
    validate(config)


def test_a_trunk_has_one_start_and_torchvision_knows_resnets_alone():
    config = changed("model.pretrained", "resnet50.pth")
    with pytest.raises(InputError, match=r"^config\.model\.pretrained: is for resnet18, .* the default network"):
        validate(config)
    for arch in ("thin", "resnet18_cifar"):
        config.model.arch = arch
        with pytest.raises(InputError, match=rf"not for {arch}; set config\.model\.arch$"):
            validate(config)
    config.model.arch = "resnet50"
    for task in ("supervised", "unsupervised", "bottom_up"):
        config.task.name = task
        validate(config)
        # What the file has not is random, and a resolved copy is as valid as what it was made of.
        assert resolved(config).model.weights == "random"
        validate(resolved(config))
    for weights in ("synthetic", "trunk.npz"):
        config.model.weights = weights
        with pytest.raises(InputError, match=rf"given beside model\.weights={weights}, .*; give one of the two$"):
            validate(config)


def test_rounding_needs_encoding():
    config = changed("wire.encode", False)
    validate(config)
    config.wire.dtype = "bfloat16"
    with pytest.raises(InputError, match=r"config\.wire\.dtype: bfloat16 .* give wire\.encode=True or float32"):
        validate(config)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_experiment(name):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    validate(config)
    assert config.method.name == name
    assert f"experiments/{name}.py" in module.__doc__


def test_the_methods_of_the_configuration_are_those_there_are():
    allowed = FIELDS["method.name"].right.removeprefix("one of ").split(", ")
    assert sorted(allowed) == sorted(METHODS)
