# Reads what is public or administrative: versions and public keys, the CA, what is revoked.

path "TENANT/transit/keys/wrapping"      { capabilities = ["read"] }
path "TENANT/transit/keys/role-release"  { capabilities = ["read"] }
path "TENANT/transit/keys/role-plan"     { capabilities = ["read"] }
path "TENANT/transit/keys/role-round"    { capabilities = ["read"] }
path "TENANT/transit/keys/role-baseline" { capabilities = ["read"] }
path "TENANT/transit/keys/role-director" { capabilities = ["read"] }
path "TENANT/kv/data/authority"          { capabilities = ["read"] }
path "TENANT/kv/data/revoked"            { capabilities = ["read"] }
