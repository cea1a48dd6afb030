"""Which devices a stage reaches: the salt and the bucket bounds, fixed once when a rollout begins.

Everything random or dependent on the fleet is decided here, so that a stage only ever adds devices.
"""

from __future__ import annotations

from collections.abc import Sequence

from fl_coordinator.cohorts import RolloutSpec
from model_delta.errors import Malformed
from model_delta.plan import BUCKETS, bucket_of

SALTS_TRIED = 500
NARROW = BUCKETS // 200
"""A stage of n devices is narrow enough at n times so many buckets: nobody looks for a better salt then."""


def choose_salt(spec: RolloutSpec, eligible: Sequence[tuple[str, bool]]) -> str:
    """The rollout's name, with a suffix if without it a stage of n devices could not be exactly n awake devices.

    Of the salts without a tie at a bound, prefers one under which the first devices, then the mirrored control's, were
    heard lately, and then one under which these devices take few buckets: a device that enrols later joins a stage with
    the probability of its share of all buckets, so that a canary in a small fleet stays what it is while that grows.
    """
    wanted = [stage.devices for stage in spec.stages if stage.devices is not None]
    if not wanted:
        return spec.name
    if max(wanted) > len(eligible):
        raise Malformed(
            f"rollout {spec.name}: a stage asks for {max(wanted)} device(s), found {len(eligible)} enrolled that match "
            "the cohorts; enrol more, widen the cohorts, or give the stage a share"
        )
    tries = max(8, min(SALTS_TRIED, 200_000 // len(eligible)))
    best, best_score = "", (-1, -1, 0)
    for attempt in range(tries):
        salt = spec.name if attempt == 0 else f"{spec.name}-{attempt}"
        ranked = sorted((bucket_of(salt, device_id), awake) for device_id, awake in eligible)
        ends = [ranked, ranked[::-1] if spec.control == "mirrored" else []]
        if any(count < len(end) and end[count - 1][0] == end[count][0] for end in ends for count in wanted):
            continue
        first, last = (sum(awake for _, awake in end[: max(wanted)]) for end in ends)
        taken = ranked[max(wanted) - 1][0] + 1
        if (first, last, -taken) > best_score:
            best, best_score = salt, (first, last, -taken)
        all_awake = first == max(wanted) and last == (max(wanted) if spec.control == "mirrored" else 0)
        if all_awake and taken <= NARROW * max(wanted):
            break
    if not best:
        raise Malformed(
            f"rollout {spec.name}: no bucket bound separates exactly {wanted} of {len(eligible)} devices; use a share"
        )
    return best


def stage_bounds(spec: RolloutSpec, salt: str, device_ids: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bucket counts of each stage for the target and the control: they only grow, and never overlap."""
    buckets = sorted(bucket_of(salt, device_id) for device_id in device_ids)
    targets: list[int] = []
    controls: list[int] = []
    for stage in spec.stages:
        if stage.devices is not None:
            bound = buckets[stage.devices - 1] + 1
            mirrored = BUCKETS - buckets[-stage.devices]
        else:
            bound = mirrored = round((stage.share or 0.0) * BUCKETS)
        targets.append(max([bound, *targets[-1:]]))
        controls.append(min(max([mirrored, *controls[-1:]]), BUCKETS) if spec.control == "mirrored" else 0)
    # A device that ever gets the target cannot stay in the control: the target's last word wins.
    return tuple(targets), tuple(
        min(control, BUCKETS - target) for control, target in zip(controls, targets, strict=True)
    )
