"""What `dipnet simulate` sweeps, as it is written on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dipnet.cli.methods import unique
from dipnet.errors import InputError
from dipnet.registry import unknown
from dipnet.units import parse_size

if TYPE_CHECKING:
    from dipnet.sim.device import Device
    from dipnet.sim.sweep import Grid
    from dipnet.store.geometry import Weights

DEFAULT_DEVICE = "phone"


def grid_of(
    devices: Sequence[str] | None,
    memories: Sequence[str] | None,
    speeds: Sequence[str] | None,
    policies: Sequence[str] | None,
    weights: Weights,
    shape: str | None,
    look_ahead: bool,
) -> Grid:
    """What is swept; InputError for what does not exist."""
    from dipnet.sim.replay import POLICIES
    from dipnet.sim.shape import load_shape
    from dipnet.sim.sweep import Grid, parse_memory

    for policy in parts(policies):
        if policy not in POLICIES:
            raise unknown("cache policy", policy, POLICIES)
    return Grid(
        devices=_devices(parts(devices) or [DEFAULT_DEVICE], parts(speeds)),
        memories=[parse_memory(each) for each in parts(memories)],
        policies=parts(policies),
        weights=weights,
        shape=load_shape(shape) if shape else None,
        look_ahead=look_ahead,
    )


def _devices(names: Sequence[str], speeds: Sequence[str]) -> list[Device]:
    """Every device with every speed of Flash, by default its own."""
    from dipnet.sim.device import load_device

    devices = [load_device(name) for name in names]
    if not speeds:
        return devices
    return [
        device.model_copy(update={"flash": device.flash.with_bandwidth(speed)})
        for device in devices
        for speed in map(_parse_speed, speeds)
    ]


def _parse_speed(text: str) -> int:
    """Bytes/s of ``1GB/s``; InputError for anything else."""
    size, per, second = text.partition("/")
    try:
        speed = parse_size(size) if not per or second.strip() == "s" else 0
    except InputError:
        speed = 0
    if speed == 0:
        raise InputError(f"{text!r} is no speed: write 1GB/s or 500MB/s")
    return speed


def parts(values: Sequence[str] | None) -> list[str]:
    """The values of an option that takes several, with commas or repeated."""
    return unique(part.strip() for value in values or () for part in value.split(","))


def numbers(option: str, values: Sequence[str] | None) -> list[float]:
    """The numbers of an option that takes several; InputError for anything else."""
    try:
        return [float(part) for part in parts(values)]
    except ValueError:
        given = ",".join(values or ())
        raise InputError(f"{option} takes numbers such as 0.5,0.67, not {given!r}") from None
