"""``python -m tests.optim.test_options`` prints the table of flags in fairseq_asam/README.md."""

import dataclasses
import enum
import math
import re

import pytest

from fairseq_asam.optim import SHARPNESS_AWARE, validate_config
from fairseq_asam.optim.options import ASAMConfig, SAMConfig
from tests.commands import ROOT


def rows() -> list[str]:
    """The table, line by line."""
    bases = [f"`{name[len('asam_') :]}`" for name in SHARPNESS_AWARE if name.startswith("asam_")]
    optimizers = "Adam with the gradient at w + ε (Algorithm 1); `asam_NAME` and `sam_NAME` do the same for "
    optimizers += f"fairseq's {', '.join(bases[:-1])} and {bases[-1]}"
    lines = ["| flag | default | meaning |", "| --- | --- | --- |"]
    lines.append(f"| `--optimizer asam` \\| `sam` | | {optimizers} |")
    of_sam = {option.name: option for option in dataclasses.fields(SAMConfig)}
    for option in dataclasses.fields(ASAMConfig):
        if option.name.startswith("_"):
            continue
        flag = f"`--{option.name.replace('_', '-')}`"
        default = as_text(option.default)
        if option.name not in of_sam:
            flag += " (`asam` only)"
        elif option.default != of_sam[option.name].default:
            default = f"{default} (`asam`), {as_text(of_sam[option.name].default)} (`sam`)"
        meaning = re.sub(r" \(default: [^)]*\)$", "", option.metadata["help"])
        meaning = re.sub(r"--[a-z-]+", r"`\g<0>`", meaning).replace("epsilon", "ε")
        if isinstance(option.type, type) and issubclass(option.type, enum.Enum):
            meaning += "; one of " + ", ".join(f"`{choice}`" for choice in option.type)
        lines.append(f"| {flag} | {default} | {meaning} |")
    return lines


def as_text(default) -> str:
    if default is None:
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{default}`" if isinstance(default, str) else f"{default:g}"


def test_help_ends_in_the_default():
    helps = {option.name: option.metadata.get("help", "") for option in dataclasses.fields(ASAMConfig)}
    assert helps["rho"].endswith(" (default: 0.2)")
    assert helps["ascent_scope"].endswith(" (default: update)")
    assert "default" not in helps["fresh_masks"] + helps["ascent_reuse"]


def test_the_readme_has_the_options_as_they_are():
    assert "\n".join(rows()) in (ROOT / "fairseq_asam" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"rho": -0.1}, "rho is -0.1, but"),
        ({"p_norm": 1.0}, "p is 1.0, but"),
        ({"eta": -1.0}, "eta is -1.0, but"),
        ({"ascent_from": -1.0}, "ascent_from is -1.0, but"),
        ({"ascent_fraction": 0.0}, "--ascent-fraction is 0.0, but"),
        ({"ascent_fraction": 1.5}, "--ascent-fraction is 1.5, but"),
        ({"ascent_interval": 0}, "--ascent-interval is 0, but"),
        ({"ascent_reuse": -0.1}, "--ascent-reuse is -0.1, but"),
        ({"ascent_reuse": math.inf}, "--ascent-reuse is inf, but"),
        ({"ascent_reuse": 0.7}, "--ascent-reuse is 0.7, but nothing is reused without --ascent-interval"),
        (
            {"ascent_fraction": 0.5, "ascent_interval": 2},
            "--ascent-fraction does not go with --ascent-interval",
        ),
        *(
            (
                {"ascent_direction": "momentum", option: value},
                f"{flag} does not go with --ascent-direction mom",
            )
            for option, value, flag in (
                ("ascent_scope", "micro-batch", "--ascent-scope micro-batch"),
                ("fresh_masks", True, "--fresh-masks"),
                ("ascent_fraction", 0.5, "--ascent-fraction"),
                ("ascent_interval", 2, "--ascent-interval"),
            )
        ),
    ],
)
def test_options_out_of_range_or_that_exclude_each_other_are_refused(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        validate_config(ASAMConfig(**options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rho": 0.0, "eta": 0.0, "p_norm": math.inf},
        {"ascent_fraction": 1.0, "ascent_interval": 1},
        {"ascent_interval": 2, "ascent_reuse": 0.0},
        {"ascent_fraction": 0.01, "ascent_scope": "micro-batch", "fresh_masks": True},
        {"ascent_interval": 5, "ascent_reuse": 2.0, "ascent_scope": "micro-batch", "fresh_masks": True},
        {"ascent_direction": "momentum", "ascent_from": 0.5},
    ],
)
def test_options_at_the_edge_are_taken(options):
    validate_config(ASAMConfig(**options))


if __name__ == "__main__":
    print("\n".join(rows()))
