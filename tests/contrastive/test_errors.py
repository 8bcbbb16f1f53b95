"""Bad input raises TypeError or ValueError, and the message names the argument, what was expected and what came."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fastloss

B, M, D = 4, 3, 5


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        return torch.nested.nested_tensor([x(2, D), x(3, D)], layout=layout)


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


VALID: dict[str, dict[str, Any]] = {
    "info_nce": {"query": x(B, D), "positive_key": x(B, D)},
    "clip_loss": {"image_features": x(B, D), "text_features": x(B, D), "logit_scale": 10.0},
    "nt_xent": {"z0": x(B, D), "z1": x(B, D)},
}
PAIRS = [("query", "positive_key"), ("image_features", "text_features"), ("z0", "z1")]
SCALES = ["temperature", "logit_scale", "temperature"]


def case(function: str, name: str, error: type[Exception], *came: str, about: str, **arguments: Any) -> Any:
    """The argument `name` is at fault, and the message tells of it by all strings `came`."""
    return pytest.param(function, name, error, came, arguments, id=f"{function} {name} {about}")


def feature_cases() -> list[Any]:
    cases = []
    for function, pair in zip(VALID, PAIRS, strict=True):
        for name in pair:
            cases += [
                case(function, name, TypeError, "list", about="no tensor", **{name: [[1.0] * D] * B}),
                case(function, name, TypeError, "NoneType", about="None", **{name: None}),
                case(function, name, TypeError, "int64", about="int64", **{name: x(B, D, dtype=torch.int64)}),
                case(function, name, TypeError, "bool", about="bool", **{name: x(B, D, dtype=torch.bool)}),
                case(function, name, TypeError, "complex64", about="complex", **{name: x(B, D, dtype=torch.complex64)}),
                case(function, name, ValueError, "(5,)", about="rank 1", **{name: x(D)}),
                case(function, name, ValueError, "(2, 4, 5)", about="rank 3", **{name: x(2, B, D)}),
                case(function, name, ValueError, "()", about="rank 0", **{name: x()}),
                case(function, name, TypeError, "sparse", "strided", about="sparse", **{name: x(B, D).to_sparse()}),
                case(function, name, TypeError, "nested", "strided", about="nested", **{name: nested(torch.strided)}),
                case(function, name, TypeError, "nested", "strided", about="jagged", **{name: nested(torch.jagged)}),
            ]
        second = pair[1]  # the first sets the size
        cases += [
            case(function, second, ValueError, "(3, 5)", "4", about="length", **{second: x(3, D)}),
            case(function, second, ValueError, "(4, 6)", "5", about="width", **{second: x(B, 6)}),
            case(function, second, ValueError, "(1, 5)", "4", about="no broadcasting", **{second: x(1, D)}),
            case(function, second, ValueError, "meta", "cpu", about="device", **{second: x(B, D, device="meta")}),
        ]
    return cases


def scale_cases() -> list[Any]:
    cases = []
    for function, name in zip(VALID, SCALES, strict=True):
        for bad in (math.nan, math.inf, -math.inf):
            cases.append(case(function, name, ValueError, str(bad), about=str(bad), **{name: bad}))
        cases += [
            case(function, name, TypeError, "bool", about="bool", **{name: True}),
            case(function, name, TypeError, "str", about="str", **{name: "0.1"}),
            case(function, name, TypeError, "NoneType", about="None", **{name: None}),
            case(function, name, TypeError, "list", about="list", **{name: [0.1] * B}),
            case(function, name, TypeError, "int64", about="integer tensor", **{name: torch.tensor(1)}),
            case(function, name, TypeError, "complex64", about="complex", **{name: torch.tensor(1j)}),
            case(function, name, ValueError, "(3,)", "4", about="length", **{name: x(3)}),
            case(function, name, ValueError, "(4, 2)", "4", about="two columns", **{name: x(B, 2)}),
            case(function, name, ValueError, "(1, 4)", "4", about="one row", **{name: x(1, B)}),
            case(function, name, ValueError, "(4, 1, 1)", "4", about="rank 3", **{name: x(B, 1, 1)}),
            case(function, name, ValueError, "meta", "cpu", about="device", **{name: x(B, device="meta")}),
            case(function, name, ValueError, "meta", "cpu", about="scalar device", **{name: x(device="meta")}),
            case(function, name, TypeError, "sparse", about="sparse", **{name: x(B).to_sparse()}),
            case(function, name, ValueError, "integer of 1329 bits", about="large", **{name: 10**400}),
            case(function, name, ValueError, "integer of 16610 bits", about="huge", **{name: 10**5000}),
        ]
        if name == "temperature":
            for bad in (0.0, -0.1, 0, -1):
                cases.append(case(function, name, ValueError, str(bad), about=repr(bad), **{name: bad}))
    return cases


def id_cases() -> list[Any]:
    cases = []
    for function, name in [
        ("info_nce", "query_ids"),
        ("info_nce", "key_ids"),
        ("clip_loss", "image_ids"),
        ("clip_loss", "text_ids"),
        ("nt_xent", "ids"),
    ]:
        rest = {"key_ids": {"query_ids": ids(B)}, "text_ids": {"image_ids": ids(B)}}.get(name, {})
        cases += [
            case(function, name, TypeError, "list", about="no tensor", **rest, **{name: [0] * B}),
            case(function, name, TypeError, "float32", about="float32", **rest, **{name: x(B)}),
            case(
                function, name, TypeError, "complex64", about="complex", **rest, **{name: x(B, dtype=torch.complex64)}
            ),
            case(function, name, ValueError, "(3,)", "(4,)", about="length", **rest, **{name: ids(3)}),
            case(function, name, ValueError, "(4, 1)", "(4,)", about="rank 2", **rest, **{name: ids(B, 1)}),
            case(function, name, ValueError, "()", "(4,)", about="rank 0", **rest, **{name: ids()}),
            case(function, name, ValueError, "meta", "cpu", about="device", **rest, **{name: ids(B).to("meta")}),
            case(function, name, TypeError, "sparse", about="sparse", **rest, **{name: ids(B).to_sparse()}),
        ]
    return [
        *cases,
        case("info_nce", "query_ids", ValueError, "key_ids", "None", about="missing", key_ids=ids(B)),
        case("clip_loss", "image_ids", ValueError, "text_ids", "None", about="missing", text_ids=ids(B)),
    ]


def negative_cases() -> list[Any]:
    cases = []
    for name, options, good in [
        ("negative_keys", {}, (M, D)),
        ("negative_keys", {"negative_mode": "paired"}, (B, M, D)),
        ("extra_negatives", {}, (M, D)),
    ]:
        about = options.get("negative_mode", "unpaired")

        def bad(error: type[Exception], *came: str, what: str, value: Any, _=(name, options, about)) -> Any:
            name, options, about = _
            return case("info_nce", name, error, *came, about=f"{about} {what}", **options, **{name: value})

        cases += [
            bad(TypeError, "list", what="no tensor", value=[[1.0] * D]),
            bad(TypeError, "int32", what="int32", value=x(*good, dtype=torch.int32)),
            bad(TypeError, "complex64", what="complex", value=x(*good, dtype=torch.complex64)),
            bad(ValueError, str(good[1:]), what="rank too low", value=x(*good[1:])),
            bad(ValueError, str((2, *good)), what="rank too high", value=x(2, *good)),
            bad(ValueError, str((*good[:-1], 6)), "5", what="width", value=x(*good[:-1], 6)),
            bad(ValueError, "meta", "cpu", what="device", value=x(*good, device="meta")),
        ]
    unpaired, paired = {"negative_keys": x(M, D)}, {"negative_keys": x(B, M, D), "negative_mode": "paired"}
    extra = {"extra_negatives": x(M, D)}
    queries = {"query_ids": ids(B)}

    def exclusive(name: str, *came: str, about: str, **arguments: Any) -> Any:
        return case("info_nce", name, ValueError, *came, about=about, **arguments)

    return [
        *cases,
        exclusive("negative_keys", "(3, 5, 5)", "4", about="paired length", **{**paired, "negative_keys": x(3, D, D)}),
        exclusive("symmetric", "negative_keys", about="unpaired", symmetric=True, **unpaired),
        exclusive("symmetric", "negative_keys", about="paired", symmetric=True, **paired),
        exclusive("extra_negatives", "negative_keys", about="beside unpaired", **extra, **unpaired),
        exclusive("extra_negatives", "negative_keys", about="beside paired", **extra, **paired),
        exclusive("key_ids", "negative_keys", "None", about="missing, unpaired", **unpaired, **queries),
        exclusive("key_ids", "negative_keys", "None", about="missing, paired", **paired, **queries),
        exclusive("key_ids", "(4,)", "(3,)", about="unpaired length", **unpaired, **queries, key_ids=ids(B)),
        exclusive("key_ids", "(3,)", "(4, 3)", about="paired rank", **paired, **queries, key_ids=ids(M)),
        exclusive("key_ids", "(5,)", "(7,)", about="extra length", **extra, **queries, key_ids=ids(5)),
    ]


def option_cases() -> list[Any]:
    cases = [
        case(function, "reduction", ValueError, repr(bad), "none", "sum", "mean", about=repr(bad), reduction=bad)
        for function in VALID
        for bad in ("median", "", None, "Mean")
    ]
    flags = [
        ("info_nce", "normalize"),
        ("info_nce", "symmetric"),
        ("clip_loss", "output_dict"),
        ("nt_xent", "normalize"),
    ]
    cases += [
        case(function, name, TypeError, "True or False", type(bad).__name__, about=repr(bad), **{name: bad})
        for function, name in flags
        for bad in ("yes", 1, None)
    ]
    bias = ("clip_loss", "logit_bias", ValueError, "a float or a tensor of one element", "(9,)")
    cases.append(case(*bias, about="length", logit_bias=x(9)))
    modes = ("unpaired", "paired")
    for bad in ("both", None):
        for negatives in ({}, {"negative_keys": x(M, D)}):
            about = f"{bad} {len(negatives)}"
            cases.append(
                case(
                    "info_nce",
                    "negative_mode",
                    ValueError,
                    repr(bad),
                    *modes,
                    about=about,
                    negative_mode=bad,
                    **negatives,
                )
            )
    return cases


@pytest.mark.parametrize(
    ("function", "name", "error", "came", "arguments"),
    [*feature_cases(), *scale_cases(), *id_cases(), *negative_cases(), *option_cases()],
)
def test_bad_argument(
    function: str, name: str, error: type[Exception], came: tuple[str, ...], arguments: dict[str, Any]
) -> None:
    with pytest.raises(error) as raised:
        getattr(fastloss, function)(**{**VALID[function], **arguments})
    message = str(raised.value)
    for part in (function, f"`{name}`", *came):
        assert part in message


@pytest.mark.parametrize("function", VALID)
def test_the_valid_call_is_valid(function: str) -> None:
    """Otherwise the cases above could fail for a reason of their own."""
    assert getattr(fastloss, function)(**VALID[function]).isfinite()


@pytest.mark.parametrize("function", VALID)
def test_keyword_only_arguments(function: str) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        getattr(fastloss, function)(*[x(B, D)] * 12)


@pytest.mark.parametrize(
    ("module", "name", "bad", "error"),
    [
        (fastloss.InfoNCE, "reduction", "median", ValueError),
        (fastloss.InfoNCE, "negative_mode", "Mean", ValueError),
        (fastloss.InfoNCE, "temperature", 0.0, ValueError),
        (fastloss.InfoNCE, "temperature", math.nan, ValueError),
        (fastloss.InfoNCE, "temperature", True, TypeError),
        (fastloss.InfoNCE, "temperature", torch.tensor(1), TypeError),
        (fastloss.InfoNCE, "normalize", 1, TypeError),
        (fastloss.InfoNCE, "symmetric", "no", TypeError),
        (fastloss.ClipLoss, "world_size", 2, ValueError),
        (fastloss.ClipLoss, "reduction", "median", ValueError),
        *((fastloss.NTXentLoss, "temperature", bad, ValueError) for bad in (0.0, -0.5, 9e-9, math.nan, math.inf)),
        *((fastloss.NTXentLoss, "temperature", bad, TypeError) for bad in (True, "0.1", None, [0.1])),
        (fastloss.NTXentLoss, "memory_bank_size", 8, ValueError),
        (fastloss.NTXentLoss, "memory_bank_size", (8, 4), ValueError),
        (fastloss.NTXentLoss, "memory_bank_size", (), ValueError),
        (fastloss.NTXentLoss, "reduction", "median", ValueError),
        (fastloss.NTXentLoss, "normalize", None, TypeError),
    ],
)
def test_modules_refuse_on_construction(module: type[nn.Module], name: str, bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{module.__name__}: `{name}` must be .*got "):
        module(**{name: bad})


class TestUseBackend:
    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match=r"`name`.*'portable'.*'fastest'"), fastloss.use_backend("fastest"):
            pass

    def test_names_are_those_of_backends(self) -> None:
        assert set(fastloss.backends()) == {"native", "portable", "triton", "cuda"}
        assert fastloss.backends()["portable"].startswith("available")


def test_clip_loss_module_takes_open_clips_arguments() -> None:
    arguments = {"local_loss": False, "gather_with_grad": False, "cache_labels": True, "rank": 0, "world_size": 1}
    assert isinstance(fastloss.ClipLoss(**arguments, use_horovod=False), torch.nn.Module)
    with pytest.raises(ValueError, match="`use_horovod` must be False"):
        fastloss.ClipLoss(use_horovod=True)


def test_wrong_types_name_the_argument() -> None:
    with pytest.raises(
        TypeError, match="NTXentLoss: `temperature` must be a float or a floating-point tensor, got str"
    ):
        fastloss.NTXentLoss("a")
    with pytest.raises(TypeError, match="info_nce: `group` must be None or a process group, got str"):
        fastloss.info_nce(torch.eye(3), torch.eye(3), group="x")
    with pytest.raises(ValueError, match="`temperature` must be finite and positive, got 0"):
        fastloss.info_nce(torch.eye(3), torch.eye(3), temperature=0)
    for temperature in (1e-46, 1e39):
        with pytest.raises(
            ValueError, match=r"`temperature` must be in the range of torch.float32, 2.94e-39 to 3.4e\+38, got 1e"
        ):
            fastloss.info_nce(torch.eye(3), torch.eye(3), temperature=temperature)
        assert fastloss.info_nce(torch.eye(3).double(), torch.eye(3).double(), temperature=temperature).isfinite()
