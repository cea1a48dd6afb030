"""The command line.

Each command is a few lines: it reads its options and calls one function of a wiring module, imported only then, so that
`atoll --help` stays quick. Every command takes `--json`; the programs of a platform then tell their events (`events`).
Errors are one line on standard error, with exit code 2 for what a person must put right, 3 for what a retry may cure,
4 for a refusal on grounds of trust.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # many small products in many processes: threads only spin

import typer
import typer.core

from atoll import __version__
from model_delta.errors import AtollError, Malformed

typer.core.HAS_RICH = False  # with rich installed, typer puts backslashes even into plain help

app = typer.Typer(
    name="atoll",
    help="Run fraud models on a fleet of payment devices: publish, roll out, watch, roll back, and learn together.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _group(name: str, text: str) -> typer.Typer:
    group = typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name=name)
    return group


rollout = _group("rollout", "Send a published version out to the fleet in stages, watch it, stop it.")
round_ = _group("round", "Let the fleet learn: federated rounds that no server can read.")
device = _group("device", "Run one device, as a device team would embed it; revoke a lost one.")
gateway = _group("gateway", "Run the program of one region.")
coordinator = _group("coordinator", "Run the program in the middle.")
aggregator = _group("aggregator", "Run one of the three aggregators of a federated round.")
fleet = _group("fleet", "Run many simulated devices in one process.")
trust = _group("trust", "The root of trust: three holders of keys, and how long everything lasts.")
broker = _group("broker", "Run the embedded MQTT 5 broker.")
model = _group("model", "Prepare a model file before it is published.")
keys = _group("keys", "The tenant's own keys: rotate the wrapping key, destroy a version's.")
vault = _group("vault", "Keep the tenant's keys in HashiCorp Vault or OpenBao.")
store = _group("store", "Where model files are kept: remove what nothing needs any more.")
delta = _group("delta", "Make patches between two files, apply them, look into them.")

DataOption = Annotated[
    Path, typer.Option("--data", envvar="ATOLL_DATA", help="The platform's data folder.", show_default=True)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
LinesOption = Annotated[bool, typer.Option("--json", help="Print one JSON object a line: ready, stopped, error.")]
StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        help="Where model files are kept: a folder, s3://BUCKET/PREFIX, gs://, az://, or `default`; if left out: as "
        "before.",
    ),
]
ContactOption = Annotated[
    float,
    typer.Option("--contact", envvar="ATOLL_CONTACT", help="Seconds to try to reach the platform.", min=0.1, max=3600),
]
DEFAULT_DATA = Path("atoll-data")
DEFAULT_CONTACT = 10.0
OURS = ("atoll", "device_sim", "edge_runtime", "fl_coordinator", "model_delta", "monitoring", "regional_gateway")
FOR_A_PERSON = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What an operating system says that only a person can put right."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"atoll {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


@app.command()
def demo(
    devices: Annotated[int, typer.Option(help="How many devices (20 to 240).", min=20, max=240)] = 60,
    rounds: Annotated[int, typer.Option(help="Federated rounds in act 3 (1 to 10).", min=1, max=10)] = 3,
    seed: Annotated[int, typer.Option(help="Seed of payments, population and faults.")] = 7,
    broker: Annotated[str, typer.Option(help="auto, mosquitto or embedded.")] = "auto",
    report: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")] = Path("demo-report"),
    json: JsonOption = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the demo's data folder and logs.")] = False,
) -> None:
    """Run the whole platform on this machine: seven acts in about two minutes, with a live page and a report.

    Example: atoll demo --devices 60 --seed 7
    """
    from atoll.demo import run_demo

    raise typer.Exit(
        run_demo(devices=devices, rounds=rounds, seed=seed, broker=broker, report=report, as_json=json, keep=keep)
    )


@app.command()
def up(
    data: DataOption = DEFAULT_DATA,
    port: Annotated[
        int | None,
        typer.Option(
            help="First of the ports used: coordinator, broker, gateway, ...; default: the data folder's, first 7400.",
            min=1,
            max=65535,
        ),
    ] = None,
    region: Annotated[str, typer.Option(help="The region of the one gateway.")] = "eu-west",
    broker: Annotated[str, typer.Option(help="auto, mosquitto or embedded.")] = "auto",
    learning: Annotated[
        bool, typer.Option("--learning", help="Also start Flower and three aggregators, for federated rounds.")
    ] = False,
    updates_log: Annotated[
        str,
        typer.Option(help="Where contributions are kept: kafka://host:port/topic or embedded; default: as before."),
    ] = "",
    store: StoreOption = "",
    json: JsonOption = False,
) -> None:
    """Start a platform here: coordinator, broker and one gateway, with their state in a data folder.

    Example: atoll up --data ./atoll-data
    """
    from atoll.up import run_up

    raise typer.Exit(
        run_up(
            data,
            port=port,
            region=region,
            broker=broker,
            learning=learning,
            updates_log=updates_log,
            store=store,
            as_json=json,
        )
    )


@app.command()
def publish(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL.onnx", help="An ONNX model file; left out with --join.")
    ] = None,
    name: Annotated[str, typer.Option("--model", help="The model's name on the platform.")] = "fraud",
    label: Annotated[
        str, typer.Option("--name", help="A name for this version, to be used as a rollout's target.")
    ] = "",
    threshold: Annotated[
        float | None, typer.Option(help="Scores at or above it are declined; default: the parent's, or 0.5.")
    ] = None,
    feature_set: Annotated[
        str,
        typer.Option(
            help="What gateways take by name: terminal-26-v1 (default of fraud) or ulb-30-v1 (default of fraud-csv)."
        ),
    ] = "",
    signature: Annotated[
        Path | None,
        typer.Option(help="An OpenSSF model-signing bundle over the model: published only if it verifies."),
    ] = None,
    signer_key: Annotated[Path | None, typer.Option(help="The signer's public key, PEM.")] = None,
    signer_chain: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of a key: the certificates that the signer's must lead to, PEM; may be repeated."),
    ] = None,
    signed_folder: Annotated[
        Path | None, typer.Option(help="The folder that the bundle covers, where that is more than the model's file.")
    ] = None,
    quantize: Annotated[
        str,
        typer.Option(
            help="auto (int8 where it measures faster or smaller enough), int8 or none (float32); default: the form "
            "of the version before, or auto."
        ),
    ] = "",
    join: Annotated[
        bool, typer.Option("--join", help="Publish one version that joins those that regions released apart.")
    ] = False,
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Describe, sign, encrypt and store a model as a new version. Nobody runs it until a rollout says so.

    Example: atoll publish fraud.onnx --name spring
    """
    from atoll.operate import join_releases, publish_model

    if join == (model is not None) or (join and (threshold is not None or feature_set or signature)):
        raise Malformed("publish: expected MODEL.onnx, or --join alone (with --model and --name)")
    if model is None:
        join_releases(data, name, label, contact_s=contact, as_json=json)
        return
    publish_model(
        data,
        model,
        name,
        label,
        threshold,
        feature_set,
        signature=signature,
        signer_key=signer_key,
        signer_chain=signer_chain or (),
        signed_folder=signed_folder,
        quantize=quantize,
        contact_s=contact,
        as_json=json,
    )


@rollout.command("apply")
def rollout_apply(
    file: Annotated[
        Path, typer.Argument(metavar="ROLLOUT.yaml", help="A rollout YAML file: cohorts, stages, guardrails.")
    ],
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Start the rollout that a YAML file describes: its cohorts, stages and guardrails.

    Example: atoll rollout apply atoll/examples/canary.yaml
    """
    from atoll.operate import apply_rollout

    apply_rollout(data, file, contact_s=contact, as_json=json)


@rollout.command("status")
def rollout_status(
    name: Annotated[str, typer.Argument(help="The rollout's name; all when left out.")] = "",
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Show the stage, health and history of one rollout, or a line for each.

    Example: atoll rollout status fraud-canary
    """
    from atoll.operate import show_rollouts

    show_rollouts(data, name, contact_s=contact, as_json=json)


@rollout.command("abort")
def rollout_abort(
    name: Annotated[str, typer.Argument(help="The rollout's name.")],
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Stop a rollout: every device goes back to the stable version.

    Example: atoll rollout abort fraud-canary
    """
    from atoll.operate import abort_rollout

    abort_rollout(data, name, contact_s=contact, as_json=json)


@round_.command("run")
def round_run(
    file: Annotated[
        Path | None, typer.Option("--file", metavar="ROUND.yaml", help="A round YAML file instead of the options.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model to improve; default: fraud.")] = None,
    quorum: Annotated[int | None, typer.Option(help="Fewest contributions to aggregate; default: 12.", min=3)] = None,
    hostile: Annotated[
        int | None, typer.Option(help="Assumed bound on hostile devices (f); default: 2.", min=0)
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds until the round closes for contributions; default: 60.", min=1)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Mini-batches a device trains; default: 40.", min=1)] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the round's end and show progress.")] = True,
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Open a federated round on the stable version and publish the candidate that comes out of it.

    Example: atoll round run --file atoll/examples/round.yaml
    """
    from atoll.rounds import run_round

    options = {"model": model, "quorum": quorum, "hostile": hostile, "deadline": deadline, "steps": steps}
    run_round(data, file, options, wait=wait, contact_s=contact, as_json=json)


@round_.command("status")
def round_status(
    round_id: Annotated[str, typer.Argument(help="The round; all when left out.")] = "",
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Show who took part in one round, who was refused and why, and what came out; or a line for each round.

    Example: atoll round status
    """
    from atoll.rounds import show_status

    show_status(data, round_id, contact_s=contact, as_json=json)


@round_.command("list")
def round_list(
    data: DataOption = DEFAULT_DATA, contact: ContactOption = DEFAULT_CONTACT, json: JsonOption = False
) -> None:
    """Show a line for each round.

    Example: atoll round list
    """
    from atoll.rounds import list_rounds

    list_rounds(data, contact_s=contact, as_json=json)


@round_.command("show")
def round_show(
    round_id: Annotated[str, typer.Argument(help="The round.")],
    transcript: Annotated[
        Path | None, typer.Option("--transcript", metavar="FILE", help="Also write the signed transcript to this file.")
    ] = None,
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Show all that is known of one round, and export its transcript.

    Example: atoll round show fraud-1700000000-0a1b2c --transcript round.cbor
    """
    from atoll.rounds import show_round

    show_round(data, round_id, transcript, contact_s=contact, as_json=json)


@round_.command("verify")
def round_verify(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Transcripts from `atoll round show`.")],
    anchors: Annotated[
        Path | None, typer.Option(metavar="ANCHORS.cbor", help="Trust anchors; default: the data folder's.")
    ] = None,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Replay rounds from their transcripts, without any running process: signatures, frozen list, choice, sum, privacy.

    Example: atoll round verify round.cbor
    """
    from atoll.rounds import verify_rounds

    verify_rounds(data, files, anchors, as_json=json)


@device.command("revoke")
def device_revoke(
    name: Annotated[str, typer.Argument(help="The device's or gateway's name.")],
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """End a lost or hostile device's certificate: no keys, no reports, no rounds from now on.

    Example: atoll device revoke pos-0002
    """
    from atoll.operate import revoke_identity

    revoke_identity(data, name, contact_s=contact, as_json=json)


@device.command("run")
def device_run(
    device_id: Annotated[str, typer.Option("--id", help="The device's name.")] = "pos-0001",
    device_class: Annotated[str, typer.Option("--class", help="pos, phone, pi or mcu.")] = "pos",
    region: Annotated[str, typer.Option(help="Home region; the platform's only one when left out.")] = "",
    payments: Annotated[
        Path | None, typer.Option(help="A labelled payments CSV (Time,V1..V28,Amount,Class); default: simulated.")
    ] = None,
    model: Annotated[str, typer.Option(help="The model to follow; default: fraud, or fraud-csv with --payments.")] = "",
    rate: Annotated[float, typer.Option(help="Payments a second.", min=0.01, max=1000)] = 2.0,
    count: Annotated[int, typer.Option(help="Stop after so many decisions; 0 runs until Ctrl-C.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the simulated payments.")] = 7,
    update_memory: Annotated[
        int, typer.Option(help="MiB that a step of an update may work in; 0: no limit.", min=0)
    ] = 0,
    update_storage: Annotated[
        int, typer.Option(help="MiB that an update may store on its way; 0: no limit.", min=0)
    ] = 0,
    cached_cost: Annotated[
        float, typer.Option(help="What a byte costs that the region has already, next to 1 for others.", min=0, max=1)
    ] = 1.0,
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line instead of text.")] = False,
) -> None:
    """Enrol one device with the platform of the data folder and let it decide payments, printing each decision.

    Example: atoll device run --id pos-0002 --count 20
    """
    from atoll.device import run_device
    from model_delta.patch.route import DeviceLimits

    run_device(
        data,
        device_id,
        device_class,
        region,
        payments,
        rate=rate,
        count=count,
        seed=seed,
        model=model,
        contact_s=contact,
        as_json=json,
        limits=DeviceLimits(update_memory << 20 or None, update_storage << 20 or None),
        cached_cost=cached_cost,
    )


@gateway.command("run")
def gateway_run(
    region: Annotated[str, typer.Option(help="The region's name.")] = "eu-west",
    store: StoreOption = "",
    data: DataOption = DEFAULT_DATA,
    json: LinesOption = False,
) -> None:
    """Run one region's gateway of the platform in the data folder."""
    from atoll.gateway import run_gateway

    run_gateway(data, region, store=store, as_json=json)


@coordinator.command("run")
def coordinator_run(store: StoreOption = "", data: DataOption = DEFAULT_DATA, json: LinesOption = False) -> None:
    """Run the coordinator of the platform in the data folder."""
    from atoll.coordinator import run_coordinator

    run_coordinator(data, store=store, as_json=json)


@aggregator.command("run")
def aggregator_run(
    name: Annotated[str, typer.Option(help="a0, a1 or a2.")] = "a0",
    data: DataOption = DEFAULT_DATA,
    json: LinesOption = False,
) -> None:
    """Run one aggregator of the platform in the data folder."""
    from atoll.aggregator import run_aggregator

    run_aggregator(data, name, as_json=json)


@broker.command("run")
def broker_run(data: DataOption = DEFAULT_DATA, json: LinesOption = False) -> None:
    """Run the embedded MQTT 5 broker of the platform in the data folder."""
    from atoll.broker import run_broker

    run_broker(data, as_json=json)


@fleet.command("run")
def fleet_run(
    devices: Annotated[int, typer.Option(help="Size of the whole fleet.", min=1, max=300)] = 20,
    shard: Annotated[str, typer.Option(help="Which part of it this process runs, as I/N.")] = "0/1",
    seed: Annotated[int, typer.Option(help="Seed of payments, population and faults.")] = 7,
    hostile: Annotated[float, typer.Option(help="Share of devices that poison their updates.", min=0, max=0.5)] = 0.0,
    rate: Annotated[float, typer.Option(help="Payments a second and device.", min=0.01)] = 4.0,
    absent: Annotated[str, typer.Option(help="Devices to leave out, separated by commas.")] = "",
    observe: Annotated[
        bool, typer.Option("--observe", help="Keep every raw update in the data folder, for comparisons only.")
    ] = False,
    metrics_port: Annotated[int, typer.Option(help="Port for /metrics; 0: none.", min=0, max=65535)] = 0,
    data: DataOption = DEFAULT_DATA,
    json: LinesOption = False,
) -> None:
    """Run simulated devices with their own payment streams against the platform of the data folder.

    Example: atoll fleet run --devices 20
    """
    from atoll.fleet import run_fleet

    run_fleet(
        data,
        devices=devices,
        shard=shard,
        seed=seed,
        hostile=hostile,
        rate=rate,
        absent=absent,
        observe=observe,
        metrics_port=metrics_port,
        as_json=json,
    )


@model.command("quantize")
def model_quantize(
    float32: Annotated[Path, typer.Argument(metavar="FP32", help="The float32 ONNX model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the int8 model goes; an old file is replaced.")],
    parent: Annotated[
        Path | None, typer.Option(metavar="INT8", help="The int8 version before, whose scales and form are kept.")
    ] = None,
    parent_fp32: Annotated[
        Path | None,
        typer.Option(
            "--parent-fp32", metavar="OLD", help="Its float32: weights that did not move keep their integers."
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            help="weights (stored as int8, computed as float32), dynamic (integers multiplied) or static (that, with "
            "fixed activation scales); default: the parent's, or weights."
        ),
    ] = "",
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="One scale a tensor instead of one a channel; without a parent.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="ROWS.npz",
            help="For static: an array of rows for each input, from which activation scales come; default: made up.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the made-up inputs on which outputs are compared.")] = 7,
    json: JsonOption = False,
) -> None:
    """Make the int8 version of a model, alike its parent, and check that it answers alike and carries the update.

    Example: atoll model quantize new.onnx new-int8.onnx --parent old-int8.onnx --parent-fp32 old.onnx
    """
    from atoll.model import quantize_file

    quantize_file(
        float32,
        out,
        parent,
        parent_fp32,
        form=form,
        per_tensor=per_tensor,
        calibration=calibration,
        seed=seed,
        as_json=json,
    )


SticksOption = Annotated[
    list[Path], typer.Option("--stick", help="A holder's folder of keys; give it several times.", show_default=False)
]
PassphrasesOption = Annotated[
    list[Path],
    typer.Option(
        "--passphrase-file",
        help="A file with a passphrase: one for all sticks, or one for each in order; default: ask "
        "(or ATOLL_TRUST_PASSPHRASE).",
        exists=True,
        dir_okay=False,
        show_default=False,
    ),
]
RegionsOption = Annotated[
    list[str], typer.Option("--region", help="A region whose versions this platform's release key vouches for.")
]


@trust.command("init")
def trust_init(
    stick: SticksOption,
    region: RegionsOption = ["core"],  # noqa: B006
    passphrase_file: PassphrasesOption = [],  # noqa: B006
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Hold the key ceremony: three people, a stick each, any two of whom may change the root of trust.

    Example: atoll trust init --stick /media/ann --stick /media/ben --stick /media/cho
    """
    from atoll.trust import trust_init

    trust_init(data, stick, region, passphrase_file, as_json=json)


@trust.command("rotate")
def trust_rotate(
    what: Annotated[str, typer.Argument(help="root, targets or online.")],
    stick: SticksOption = [],  # noqa: B006
    new_stick: Annotated[
        list[Path], typer.Option("--new-stick", help="An empty folder for a new holder's keys; three or more.")
    ] = [],  # noqa: B006
    region: RegionsOption = [],  # noqa: B006
    passphrase_file: PassphrasesOption = [],  # noqa: B006
    discard: Annotated[bool, typer.Option("--discard", help="Forget what waits for signatures.")] = False,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Renew root or targets, replace holders (--new-stick) or online keys; all at once or stick by stick.

    Example: atoll trust rotate online --stick /media/ann --stick /media/cho
    """
    from atoll.trust import trust_rotate

    trust_rotate(data, what, stick, new_stick, region, passphrase_file, discard=discard, as_json=json)


@trust.command("status")
def trust_status(data: DataOption = DEFAULT_DATA, json: JsonOption = False) -> None:
    """Show every role's version, expiry and days left, who can sign it, and what waits for signatures.

    Example: atoll trust status
    """
    from atoll.trust import trust_status

    trust_status(data, as_json=json)


TokenFileOption = Annotated[
    str,
    typer.Option("--token-file", help="File with an administrator's token; - reads standard input; else VAULT_TOKEN."),
]
AddressOption = Annotated[str, typer.Option("--address", envvar="VAULT_ADDR", help="https://HOST:PORT of the server.")]
TenantOption = Annotated[str, typer.Option("--tenant", help="Whose keys; the platform's own tenant.")]
BaseOption = Annotated[str, typer.Option("--base", help="Folder of the tenants' mounts on the server.")]
CaOption = Annotated[str, typer.Option("--ca", help="PEM file of the CA that certifies the server.")]


@vault.command("setup")
def vault_setup(
    address: AddressOption,
    token_file: TokenFileOption = "",
    tenant: TenantOption = "acme",
    base: BaseOption = "atoll",
    ca: CaOption = "",
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Make mounts, keys, policies and logins for a new platform, which uses them from its first start on. Repeatable.

    Example: atoll vault setup --address https://vault.example:8200 --token-file admin.token
    """
    from atoll.vault import setup_vault

    setup_vault(data, address, token_file, tenant=tenant, base=base, ca=ca, migrate=False, as_json=json)


@vault.command("migrate")
def vault_migrate(
    address: AddressOption,
    token_file: TokenFileOption = "",
    tenant: TenantOption = "acme",
    base: BaseOption = "atoll",
    ca: CaOption = "",
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Move the keys of a stopped platform to the server: wrapped keys, certificates and devices stay valid unchanged.

    Example: atoll vault migrate --address https://vault.example:8200 --token-file admin.token
    """
    from atoll.vault import setup_vault

    setup_vault(data, address, token_file, tenant=tenant, base=base, ca=ca, migrate=True, as_json=json)


@vault.command("status")
def vault_status(data: DataOption = DEFAULT_DATA, json: JsonOption = False) -> None:
    """Log in as the coordinator does and show which keys are there.

    Example: atoll vault status
    """
    from atoll.vault import vault_status

    vault_status(data, as_json=json)


@keys.command("status")
def keys_status(
    data: DataOption = DEFAULT_DATA, contact: ContactOption = DEFAULT_CONTACT, json: JsonOption = False
) -> None:
    """Show which versions of the wrapping key are kept.

    Example: atoll keys status
    """
    from atoll.keys import keys_status

    keys_status(data, contact_s=contact, as_json=json)


@keys.command("rotate")
def keys_rotate(
    forget: Annotated[
        bool, typer.Option("--forget", help="Destroy the old versions: older backups then hold no keys.")
    ] = False,
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Give every artifact key a new wrapping key.

    Example: atoll keys rotate
    """
    from atoll.keys import rotate_keys

    rotate_keys(data, forget=forget, contact_s=contact, as_json=json)


@keys.command("shred")
def keys_shred(
    digest: Annotated[str, typer.Argument(help="The version: its manifest digest, as `atoll publish` printed it.")],
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Destroy a version's key for good. Devices that hold the version opened run it until it expires.

    Example: atoll keys shred 1f2e...64 hex digits
    """
    from atoll.keys import shred_release

    shred_release(data, digest, contact_s=contact, as_json=json)


@store.command("gc")
def store_gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Remove from the coordinator's store what no plan, rollback, open round or device within the window needs.

    Example: atoll store gc --dry-run
    """
    from atoll.stores import clean_store

    clean_store(data, dry_run=dry_run, contact_s=contact, as_json=json)


@delta.command("make")
def delta_make(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="The file that the other side has.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The file that it is to get.")],
    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="Where the patch goes; an old file is replaced.")],
    format_name: Annotated[
        str, typer.Option("--format", help="bsdiff40 (any bspatch applies it) or tp1 (denser).")
    ] = "bsdiff40",
    json: JsonOption = False,
) -> None:
    """Make a patch from one file to another: by the names of tensors in models, by a search in other files.

    Example: atoll delta make old.onnx new.onnx model.patch
    """
    from atoll.delta import make_delta

    make_delta(old, new, patch, format_name=format_name, as_json=json)


@delta.command("apply")
def delta_apply(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="The file that the patch was made from.")],
    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="A patch of any format that `make` writes.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the new file goes; an old file is replaced.")],
    sha256: Annotated[str, typer.Option("--sha256", help="Keep the new file only if this is its SHA-256.")] = "",
    json: JsonOption = False,
) -> None:
    """Make the new file out of the old one and a patch, in little memory; it gets its name only when it is complete.

    Example: atoll delta apply old.onnx model.patch new.onnx
    """
    from atoll.delta import apply_delta

    apply_delta(old, patch, out, sha256=sha256, as_json=json)


@delta.command("inspect")
def delta_inspect(
    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="A patch of any format that `make` writes.")],
    old: Annotated[
        Path | None, typer.Option("--old", help="The old file, to name the tensors that change (tp1 only).")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what a patch says about itself: format, sizes, digests, memory to apply it, what it changes.

    Example: atoll delta inspect model.patch
    """
    from atoll.delta import inspect_delta

    inspect_delta(patch, old, as_json=json)


def _interrupted(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _end(error: str, exit_code: int) -> NoReturn:
    """One line for a person; with `--json` also one object on standard output for a program."""
    from atoll.events import Events

    print(f"atoll: {error}", file=sys.stderr)
    Events("atoll", as_json="--json" in sys.argv[1:]).failed(error, exit_code)
    sys.exit(exit_code)


def main() -> None:
    """Entry point: run the command, turn our errors into one line and an exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # A command that has something to stop installs its own; the others just end, without a traceback.
        signal.signal(signal.SIGINT, _interrupted)
    try:
        app()
    except AtollError as error:
        from atoll.entry import exit_code

        _end(str(error), exit_code(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OURS:
            raise
        _end(f"{error.name} is not installed: expected the extras of this command; pip install 'atoll[all]'", 2)
    except OSError as error:
        if error.errno not in FOR_A_PERSON or error.filename is None:
            raise
        _end(f"{error.filename}: {error.strerror}; free some space or correct permissions", 2)
    except KeyboardInterrupt:
        sys.exit(130)
