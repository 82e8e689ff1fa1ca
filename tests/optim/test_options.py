"""``python -m tests.optim.test_options`` prints the table of flags in fairseq_asam/README.md."""

import dataclasses
import enum
import re

from fairseq_asam.optim import SHARPNESS_AWARE
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
        default = shown(option.default)
        if option.name not in of_sam:
            flag += " (`asam` only)"
        elif option.default != of_sam[option.name].default:
            default = f"{default} (`asam`), {shown(of_sam[option.name].default)} (`sam`)"
        meaning = re.sub(r" \(default: [^)]*\)$", "", option.metadata["help"])
        meaning = re.sub(r"--[a-z-]+", r"`\g<0>`", meaning).replace("epsilon", "ε")
        if isinstance(option.type, type) and issubclass(option.type, enum.Enum):
            meaning += "; one of " + ", ".join(f"`{choice}`" for choice in option.type)
        lines.append(f"| {flag} | {default} | {meaning} |")
    return lines


def shown(default) -> str:
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


if __name__ == "__main__":
    print("\n".join(rows()))
