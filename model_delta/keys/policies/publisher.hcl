# Makes versions of models: asks for an artifact key and signs a release. Opens no key that was wrapped before,
# certifies no device.

path "TENANT/transit/datakey/plaintext/wrapping" { capabilities = ["update"] }
path "TENANT/transit/sign/role-release"          { capabilities = ["update"] }
path "TENANT/transit/keys/role-release"          { capabilities = ["read"] }
path "TENANT/transit/keys/role-plan"             { capabilities = ["read"] }
path "TENANT/transit/keys/role-round"            { capabilities = ["read"] }
path "TENANT/transit/keys/role-baseline"         { capabilities = ["read"] }
path "TENANT/transit/keys/role-director"         { capabilities = ["read"] }
path "TENANT/kv/data/authority"                  { capabilities = ["read"] }
