# Rotates the wrapping key and moves records to it. Sees no plaintext: there is no decrypt here, and no sign.

path "TENANT/transit/rewrap/wrapping"      { capabilities = ["update"] }
path "TENANT/transit/keys/wrapping/rotate" { capabilities = ["update"] }
path "TENANT/transit/keys/wrapping"        { capabilities = ["read"] }
