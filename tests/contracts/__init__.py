"""What holds between tenants, whoever implements it."""
