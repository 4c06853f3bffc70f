"""The text of a profile for a terminal."""

from __future__ import annotations

import math
from typing import Any

from trainer.expert_usage.analysis import DEAD_SHARE, Profile
from trainer.scoring.table import format_table


def describe(profile: Profile) -> str:
    """Return tables of the use and the cost of the encoders, and the conclusions from them."""
    tree = profile.to_json()
    head = f"{profile.run}: {profile.origin}"
    if not tree["tasks"]:
        return f"{head}\nno clips, so nothing was routed"
    total = tree["tasks"]["all"]
    head += f"; {total['num_clips']:,} clips, {total['audio_sec'] / 3600:.2f} h of audio"
    if profile.skipped:
        reasons = ", ".join(f"{num} {reason}" for reason, num in sorted(profile.skipped.items()))
        head += f"; skipped samples: {reasons}"
    blocks = [head, _shares(tree), _weights(tree), _confidence(tree), _times(tree), _verdict(profile, tree)]
    return "\n\n".join(block for block in blocks if block)


def _shares(tree: dict[str, Any]) -> str:
    rows = []
    for name in tree["tasks"]["all"]["encoders"]:
        label = f"{name} (always)" if name == tree["primary"] else name
        shares = {task: found["encoders"][name]["clip_share"] for task, found in tree["tasks"].items()}
        rows.append({"encoder": label, **shares})
    rows.append({"encoder": "clips", **{task: found["num_clips"] for task, found in tree["tasks"].items()}})
    return "share of clips that ran each encoder\n" + format_table(rows)


def _weights(tree: dict[str, Any]) -> str:
    rows = []
    for name in tree["experts"]:
        found = tree["tasks"]["all"]["encoders"][name]
        rows.append(
            {
                "encoder expert": name,
                "clips": found["num_clips"],
                "share of clips": found["clip_share"],
                "share of audio": found["audio_share"],
                **{f"weight, {gate} gate": weight for gate, weight in found["weight"].items()},
            }
        )
    return "use and mean mixing weight of each encoder expert, over all clips\n" + format_table(rows) if rows else ""


def _confidence(tree: dict[str, Any]) -> str:
    if len(tree["experts"]) < 2:
        return ""
    rows = [
        {
            "task": task,
            **{f"{gate}, per clip": found["entropy"][gate] for gate in tree["gates"]},
            **{f"{gate}, of the mean": found["entropy_of_mean"][gate] for gate in tree["gates"]},
            **({"drift": tree["drift"].get(task)} if tree["windows"] else {}),
        }
        for task, found in tree["tasks"].items()
    ]
    most = math.log(len(tree["experts"]))
    drift = "; drift of the encoder experts' shares of the work, from 0 to 1" if tree["windows"] else ""
    return (
        f"entropy of the gates in nats, at most {most:.3f}, per clip and of the mean over clips{drift}\n"
        + format_table(rows)
    )


def _times(tree: dict[str, Any]) -> str:
    time = tree["time"]
    if time is None:
        return ""
    rows = [
        {
            "encoder": name,
            "compute s": found["compute_sec"],
            "slowest rank s": found["compute_sec_max"],
            "wait s": found["wait_sec"],
            "sent MB": found["sent_bytes"] / 1e6,
            "received MB": found["received_bytes"] / 1e6,
            "s per audio s": found["sec_per_audio_sec"],
        }
        for name, found in time["encoders"].items()
    ]
    return f"cost per step, mean over {time['num_ranks']} ranks (MB: sum over ranks)\n" + format_table(rows)


def _verdict(profile: Profile, tree: dict[str, Any]) -> str:
    lines = []
    for name in profile.dead:
        since = profile.last_used_step(name)
        if profile.history:
            when = f"of the latest clips; last used in step {since}" if since else "of the clips; never used"
        else:
            when = "of the clips"
        lines.append(f"dead       {name}: runs on less than {DEAD_SHARE:.1%} {when}")
    if tree["experts"] and not profile.dead:
        lines.append("dead       none")
    time = tree["time"]
    if time is not None:
        lines.append(
            f"imbalance  {time['imbalance']:.3f} (slowest rank / mean): waiting for the slowest rank costs "
            f"{time['lost_sec']:.3f} s of each {time['step_sec']:.3f} s step ({time['lost_share']:.1%})"
        )
    if tree["placement"] is not None:
        lines += _placement(tree["placement"])
    return "\n".join(lines)


def _placement(found: dict[str, Any]) -> list[str]:
    def shown(placement: dict[str, Any]) -> str:
        slots = "  ".join(f"[{' '.join(names) or '-'}]" for names in placement["slots"])
        return f"{slots}  {placement['slowest_sec']:.3f} s on the slowest rank, imbalance {placement['imbalance']:.3f}"

    lines = []
    if found["current"] is not None:
        lines.append(f"placement  current    {shown(found['current'])}")
        share = "" if found["saved_share"] is None else f" ({found['saved_share']:.1%} of the step)"
        lines.append(f"           suggested  {shown(found['suggested'])}: saves {found['saved_sec']:.3f} s{share}")
    elif found["ep"] > 1:
        lines.append(f"placement  suggested  {shown(found['suggested'])}")
    else:
        lines.append("placement  every rank holds every encoder (parallel.expert = 1)")
    for other in found["others"]:
        lines.append(f"           with parallel.expert={other['ep']}  {shown(other)}")
    return lines
