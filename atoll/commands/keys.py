"""The tenant's own keys, and the vault that may keep them."""

from __future__ import annotations

from typing import Annotated

import typer

from atoll.commands.options import DEFAULT_CONTACT, DEFAULT_DATA, ContactOption, DataOption, JsonOption, group

keys = group("keys", "The tenant's own keys: rotate the wrapping key, destroy a version's.")
vault = group("vault", "Keep the tenant's keys in HashiCorp Vault or OpenBao.")

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
