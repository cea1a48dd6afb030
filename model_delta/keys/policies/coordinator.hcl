# A coordinator of the tenant: wraps and opens artifact keys, signs, certifies devices, revokes, shreds a version.
# It reads no private key, changes no mount and no policy, and reaches no other tenant's path.

path "TENANT/transit/datakey/plaintext/wrapping" { capabilities = ["update"] }
path "TENANT/transit/encrypt/wrapping"           { capabilities = ["update"] }
path "TENANT/transit/decrypt/wrapping"           { capabilities = ["update"] }
path "TENANT/transit/rewrap/wrapping"            { capabilities = ["update"] }
path "TENANT/transit/keys/wrapping/rotate"       { capabilities = ["update"] }
path "TENANT/transit/keys/wrapping/trim"         { capabilities = ["update"] }
path "TENANT/transit/keys/wrapping/config" {
  capabilities = ["update"]
  # Neither deletion nor export can be switched on.
  allowed_parameters = {
    "min_decryption_version" = []
    "min_encryption_version" = []
  }
}
path "TENANT/transit/keys/wrapping"              { capabilities = ["read"] }
path "TENANT/transit/keys/role-release"          { capabilities = ["read"] }
path "TENANT/transit/keys/role-plan"             { capabilities = ["read"] }
path "TENANT/transit/keys/role-round"            { capabilities = ["read"] }
path "TENANT/transit/keys/role-baseline"         { capabilities = ["read"] }
path "TENANT/transit/keys/role-director"         { capabilities = ["read"] }
path "TENANT/transit/sign/role-release"          { capabilities = ["update"] }
path "TENANT/transit/sign/role-plan"             { capabilities = ["update"] }
path "TENANT/transit/sign/role-round"            { capabilities = ["update"] }
path "TENANT/transit/sign/role-baseline"         { capabilities = ["update"] }
path "TENANT/transit/sign/role-director"         { capabilities = ["update"] }
path "TENANT/transit/sign/authority"             { capabilities = ["update"] }
path "TENANT/kv/data/authority"                  { capabilities = ["read"] }
path "TENANT/kv/data/revoked"                    { capabilities = ["create", "read", "update"] }
